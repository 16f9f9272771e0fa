"""Which pieces of a solution make up a step: one text for each rule, cut by hand. A step ends where a `|` stands."""

import random
import time

import pytest

from rtd_jax.data.prose import prose_steps
from rtd_jax.data.schemas.prose import from_prose
from rtd_jax.data.trace import check_spans
from rtd_jax.eval.chains import score_chain

RULES = {
    "lines": "Ann has 4 + 5 = 9 pens.|\nShe loses 2, so 9 - 2 = 7 are left.|\n\nBob has 2 * 7 = 14 pens.",
    "a display formula belongs to the text before it": (
        "The pens cost\n\\[ 3 \\times 4 = 12 \\]|\nThe books cost\n\n$$ 2 \\cdot 5 = 10 $$|\nBoth:\n"
        "\\begin{align*}\n12 + 10 &= 22 \\\\[2pt]\n&= 22\n\\end{align*}"
    ),
    "a sentence goes on after a display formula": (
        "Three cost\n\\[ 3x = 12 \\]\nwhere x is the price.|\nso 2x = 8|\nx = 4"
    ),
    "a formula on a line belongs to a line without one": "Ann buys three.\n3 * 4 = 12|\nHer change is\n20 - 12 = 8",
    "formulas on lines of their own are steps": "16 - 3 = 13|\n$13 - 4$ = 9|\n9 eggs * 2 dollars = 18 dollars",
    "equals signs go on": "The area is (3 + 4) * 2\n= 7 * 2\n= 14|\nHalf of it is 14 / 2\n≈ 7.",
    "a table belongs to the text before it": "The prices are these.\n| pen | 4 |\n|---|---|\n| book | 5 |",
    "a step that is numbered holds what stands under its title": (
        "## Step 1: The pens\nThere are three pens.\n\nEach costs 4, so 3 * 4 = 12.|\n\n## Step 2: The books\n"
        "Two books cost 10.\n\n### In all\n\n12 + 10 = 22"
    ),
    "Step 1 without a heading": "Step 1: They cost 3 * 4 = 12.\nThat is little.|\nStep 2: Add the tax of 3.",
    "numbered titles": (
        "1. **The pens:**\n   - There are 3.\n   - Each costs 4.\n\n   So they cost 3 * 4 = 12.|\n\n"
        "2. **The books:** \n\n   2 * 5 = 10|\n\nTogether they cost 12 + 10 = 22."
    ),
    "other headings belong to what follows": "**Pens**\n\nThey cost 3 * 4 = 12.|\n\n### Books\n\nThey cost 2 * 5 = 10.",
    "formulas are items too": "To solve it, follow these steps:\n- \\( 3 * 4 = 12 \\)|\n- 2 * 5 = 10",
    "a list belongs to the line that introduces it": (
        "First, we collect the costs:\n- pens: 12\n- books: 10\n  and their covers|\nThen we add them: 12 + 10 = 22.|\n"
        "The taxes are:\n\na) 1\n\nb) 2"
    ),
    "the items of another list are steps": (
        "* 3 * 4 = 12 for the pens\n  - blue ones\n  - red ones|\n* 2 * 5 = 10 for the books|\n* 12 + 10 = 22 in all"
    ),
    "the items of a list of the whole solution are steps": (
        "To find the total, follow these steps:\n1. The pens cost 3 * 4 = 12.|\n2. The books cost 2 * 5 = 10."
    ),
    "an opening belongs to the first step": (
        "Sure, let's break it down step by step!\n\nTo find the total, we need to know both prices.\n\n3 * 4 = 12|\n\n"
        "2 * 5 = 10"
    ),
    "an announcement belongs to the step after it": (
        "The pens cost 3 * 4 = 12.|\n\nNow, let's find the price of the books.\n\nThey cost 2 * 5 = 10.|\n\n"
        "Next, calculate the sum.\n\nIt is 12 + 10 = 22."
    ),
    "to find something in the same sentence is a step": "To find it, we take 4 from 9, which is 5.|\nTwice 5 is 10.",
    "a plan of instructions belongs to the first step": (
        "We need to follow these steps: First, calculate the price. Second, find the tax.\n\n3 * 4 = 12|\n\n12 / 4 = 3"
    ),
    "a closing belongs to the last step": "3 * 4 = 12|\n12 + 10 = 22\nSo, the answer is \\boxed{22}.\nI hope it helps!",
    "a closing below a title": "3 * 4 = 12|\n12 + 10 = 22\n\n### Conclusion\n\nTherefore, they cost $22.00 in all.",
    "a closing of a step": "They sell 3 * 40 = 120 pens.\nThus 120 pens are sold.|\nThis is 120 / 2 = 60 a day.",
    "an answer line": "3 * 4 = 12|\n12 + 10 = 22\n#### 22",
    "an answer may come from further away": "There are 7 of them.|\nThe others are 3 * 4 = 12.\nThe answer is 7.",
    "a conclusion with another number is a step": "3 * 4 = 12|\nSo 8 of the 20 are left.",
    "a conclusion that computes is a step": "3 * 4 = 12|\nSo 12 + 12 is what she pays.",
    "a conclusion in words is a step": "A whale breathes air.|\nThus a whale is no fish.",
    "First and Next begin a step within a line": (
        "First, pens cost 3 * 4 = 12. They are blue.| Next, the books cost 2 * 5 = 10.| Finally, we add \\(12 + 10\\)."
    ),
    "First without a comma is a word": "Ann is first. First graders get 3 pens. Next year they get 4. = 7",
    "a line of sentences with formulas": (
        "Ann has 3 boxes. Each has 4 pens, so she has 3 * 4 = 12.| Mrs. Bo has 12 + 10 = 22. The answer is 22."
    ),
    "a line of sentences without formulas": "Whales are mammals.| Mammals breathe air.| So whales breathe air.",
    "a line with an answer line below it": "Whales are mammals.| Fish are not.\n#### no",
    "nothing is cut within a formula": "\\[ \\text{A. Next, B. Then, C.}\n\n= 5 \\]"[:30] + " \\]| Next, we add 5.",
    "a mark that is never closed is no formula": "He pays \\[ 5.|\n\nHe gets 3 \\) pens.",
    "a rule of dashes is no step": "It is 3 * 4 = 12.\n\n---|\n\nThat is 2 * 5 = 10.",
    "only an opening": "Let's think step by step.",
    "only an answer": "\\boxed{5}",
    "other line ends": "3 * 4 = 12.|\r\n\r\nNow 2 * 5 = 10.\r\n",
}


@pytest.mark.parametrize("marked", RULES.values(), ids=RULES)
def test_steps_of_prose(marked):
    expected = [step.strip() for step in _parts(marked)]
    text = "".join(_parts(marked))
    assert [text[start:end] for start, end in prose_steps(text)] == expected


def _parts(marked: str) -> list[str]:
    """At each `|` but those of a table's rows."""
    if "\n|" in marked:
        return [marked]
    return marked.split("|")


def test_every_character_but_white_space_is_in_a_step():
    generator = random.Random(0)
    parts = [
        *" \n.:=$#*-",
        "\n\n",
        "1. ",
        "\\[",
        "\\]",
        "$$",
        "So ",
        "First, ",
        "Step 2: ",
        "**",
        "5",
        "ab",
        "  - ",
        "Let's ",
    ]
    for _ in range(2000):
        text = "".join(generator.choices(parts, k=generator.randrange(1, 30)))
        spans = tuple(prose_steps(text))
        if text.strip():
            check_spans(spans, text)
            assert not text[spans[-1][1] :].strip()
        else:
            assert not spans


@pytest.mark.parametrize(
    "unit",
    [
        *(
            "9",
            "{",
            "9^{",
            "(",
            ")",
            "$",
            "#",
            " ",
            "\n ",
            "**",
            "1,",
            '!"',
            "$$ ",
            "\\\\",
            "\\[",
            "\\(",
            "\\begin{a}",
            "\\boxed{",
        ),
        *(
            "is ",
            "is (((",
            "to find ",
            ". A",
            ". First, ",
            ".)))",
            "- a\n",
            "= 5\n",
            "| a",
            "So 5.\n",
            "1. **a:**\n",
            "Step 1:\n",
        ),
        "\\[ a \\]\n",
    ],
)
def test_the_time_is_linear_in_the_length_of_hostile_text(unit):
    """A quadratic rule would take 16 times as long for 4 times the text, and minutes for 10^5 characters."""

    def took(length: int) -> float:
        started = time.process_time()
        prose_steps((unit * length)[:length] + "x")
        return time.process_time() - started

    # The least of three: whoever shares the cores makes single runs take many times as long.
    short, long = (min(took(length) for _ in range(3)) for length in (25_000, 100_000))
    assert long < 0.05 or long < 10 * short, (short, long)


def test_a_chain_whose_steps_have_several_lines_scores_as_right():
    row = {"prompt": "p", "text": "Pens:\n\\[\n3 * 4 = 12\n\\]\n\nIn all:\n- 12 pens\n- 12 + 10 = 22 things\n\n#### 22"}
    trace = from_prose(row)
    assert trace.depth == 2
    record = score_chain(trace.completion, trace)
    assert record["correct"]
    assert (record["reference"], record["reference_text"]) == (list(trace.steps), trace.body)
