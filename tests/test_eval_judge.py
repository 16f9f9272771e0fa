"""The step judge: what it reads, what it calls false, and which step it finds to be the first wrong one."""

import json
from fractions import Fraction
from pathlib import Path

import pytest

from rtd_jax.data.schemas.gsm8k import SCHEMA as GSM8K
from rtd_jax.data.trace import Trace
from rtd_jax.eval.judge.equations import equations, solution
from rtd_jax.eval.judge.final import final_number
from rtd_jax.eval.judge.judge import judge_steps
from rtd_jax.eval.judge.mentions import mentioned
from rtd_jax.eval.judge.ways import Values, ways

F = Fraction


def value(side):
    return None if side.value is None else side.value.constant if not side.value.unknown else "unknown"


@pytest.mark.parametrize(
    ("text", "left", "right"),
    [
        ("8 * 9 = 72", 72, 72),
        ("He pays 3 boxes x $4.50 per box = $13.50 in all.", F(27, 2), F(27, 2)),
        (r"\[ \frac{3}{4} \times 16 = 12 \text{ guests} \]", 12, 12),
        (r"\(5\) months \(\times\) \$\(20,000\) = \$\(100,000\)", 100_000, 100_000),
        (r"\[ 15 (\text{red}) + 45 (\text{blue}) = 60 \text{ cars} \]", 60, 60),
        (r"\[ 30 \, \text{dollars} - 24 \, \text{dollars} = 6 \, \text{dollars} \]", 6, 6),
        ("90 shrimp / 6 shrimp/minute = 15 minutes", 15, 15),
        ("2 cups / 1/4 cup = 8 servings", 8, 8),
        ("20% of 50 = 10", 10, 10),
        ("(2/3)(9) = 6", 6, 6),
        ("3 1/2 = 3.5", None, F(7, 2)),
        ("3½ * 2 = 7", 7, 7),
        ("1,200 ÷ 4 = 300", 300, 300),
        ("400 000 x 3/100 = 12 000", 12_000, 12_000),
        ("12 divided by 4 = 3", 3, 3),
        ("5 times 3 = 15", 15, 15),
        ("2^{10} = 1024", 1024, 1024),
        ("8*1=<<8*1=8>>8", 8, 8),
        ("In May 6 are lost: <<20-6=14>>14.", 14, 14),
        ("-14 + 6 = -8", -8, -8),
        ("- 14 + 6 = 20", 20, 20),  # a list's bullet
        ("**Total:** 4 + 5 = 9", 9, 9),
        # No value: a name is an operand, two unknowns, a place, a clock time, a scale in words.
        ("Total - 5 = 10", None, 10),
        ("Price * 3 = 12", None, 12),
        ("300 / number of people = 30", None, 30),
        ("x + y = 10", None, 10),
        ("1st - 5 = 6th", None, None),
        ("3:30 + 2 = 5", None, 5),
        ("5 dozen = 60", None, 60),
        ("half of 30 = 15", None, 15),
        ("The time to 400 degrees - 5 = 7", 395, 7),  # before an `=` words are a title, not an operand
        ("9^{9^{9^9}} = 3", None, 3),
        ("the cost = the time to heat to 400 degrees - 5 minutes", None, None),
    ],
)
def test_both_sides_of_an_equation_are_read_from_plain_text_and_latex(text, left, right):
    (equation,) = equations(text)
    assert (value(equation.left), value(equation.right)) == (left, right)


def test_chains_of_equals_and_lines_that_go_on_are_one_derivation():
    found = equations("Total = 3 * 4 = 12 apples and 5 * 2 = 10 pears")
    assert [(value(e.left), value(e.right)) for e in found] == [(None, 12), (12, 12), (10, 10)]
    aligned = equations("\\begin{aligned} x &= 2 + 3 \\\\ &= 5 \\end{aligned}")
    assert [(value(e.left), value(e.right)) for e in aligned] == [("unknown", 5), (5, 5)]
    assert [solution(e) for e in equations("2x + (x - 10) = 200")] == [("x", F(70))]
    assert solution(equations("3 = 3")[0]) is None


def test_numbers_that_are_labels_or_parts_of_fractions_are_not_mentioned():
    assert mentioned("Step 2: she has 15 apples\n3. and 1/4 of 20, \\frac{2}{5} of 30") == [15, 20, 30]


RIGHT = [
    "10 / 3 = 3.33",
    "10 / 3 = 3.3",
    "10 / 3 ≈ 3",
    "10 / 3 is approximately = 3",
    "17 / 5 = 3 full boxes with a remainder of 2",
    "30 / 40 * 100 = 75%",
    "30 / 40 = 75%",
    "3 * 50 cents = $1.50",
    "1 hour = 60 minutes",
    "12 months = 165 * 12",
    "3 / 2 = 1.50 + 3.00 = 4.50",
    "4 / 3 = 1 and 1/3",
    "1/2 cup = 4 ounces",
    "New position: 1st - 5 = 6th",
    "1/3 = 0.33. Then 0.33 * 300 = 100",
    # A title with numbers in it, a label, a range.
    "Cost of 5 shirts at $20 = 5 × $20 = $100",
    "The sum of 5 and 3 = 5 + 3 = 8",
    "Section 2 = x + 200, so x = 30",
    "Weeks 1-2 = 10 + 10 = 20",
    # An unknown that is set anew.
    "x = 4 or x = -4",
    "T = 10 + 5 = 15, then T = 15 + 3 = 18",
    "If n = 1, 5n = 5. If n = 2, 5n = 10.",
    # Rounded percentages and whole results, amounts more or less by a share.
    "2/3 = 67%",
    "29 / 2 = 14 pairs, and 1 is left",
    "$20 - 10% = $18",
    "100% - 20% = 80%",
    # Mixed numbers, powers, angles.
    r"2\frac{1}{2} \times 4 = 10",
    "5² = 25 and 6² = 36",
    "180° - 90° = 90°",
    # Units of one kind.
    "1 hour + 15 minutes = 75 minutes",
    "30 minutes × 4 = 2 hours",
    "45 + 30 = 1 hour 15 minutes",
    "6 inches × 4 = 2 feet",
    "$20 - 75 cents = $19.25",
    "5 m × 4 m = 20 m^2",
]
FALSE = [
    "10% of $50 = 0.1 × 50 = $500",
    "1/4 of 20 = 22",
    "30 minutes × 4 = 3 hours",
    r"8 + 2 = \text{37 apples}",
    "1) 8 + 2 = 37",
    "a) 8 + 2 = 37",
    "100% - 20% = 70%",
    "40 / 5 = 7",
    "10 / 3 = 3",
    "10 / 3 = 3.5",
    "2 * 25000 = 5000",
    "5% of 200 = 20",
    r"\frac{40}{5} = 3",
    "2 + 2 = 5 + 1",
]


@pytest.mark.parametrize("text", RIGHT)
def test_what_people_call_right_is_not_false(text):
    assert judge_steps("", [text]).first_error == -1, judge_steps("", [text]).steps


@pytest.mark.parametrize("text", FALSE)
def test_false_arithmetic_is_wrong_and_said(text):
    judgement = judge_steps("", ["1 + 1 = 2", text])
    assert judgement.first_error == 1
    assert judgement.answer_right is None
    assert judgement.steps[0].right is True
    assert judgement.steps[1].right is False
    assert " is " in judgement.steps[1].reason


def test_an_unknown_has_one_value_until_it_is_named_again():
    solved = ["2x = 10", "so x = 5", "Let x be the number of pears. x + 1 = 3"]
    assert judge_steps("", solved).first_error == -1
    assert judge_steps("", ["2x = 10 and 3x = 12"]).first_error == 0
    wrong = judge_steps("", ["(2/3)x * 1.5 = 150", "(4/6)x * 1.5 = 300"])
    assert wrong.first_error == 1
    assert wrong.steps[1].reason == "(4/6)x * 1.5 = 300 gives x = 300, before 150"


PROBLEM = (
    "Ann has 200 shoes. She gets 5 pairs on Monday, 15 pairs on Wednesday and 30 pairs on Friday, and gives 180 shoes "
    "away. How many shoes has she?"
)
REFERENCE = Trace.of_steps(
    PROBLEM, ["5 + 15 = 20", "20 + 30 = 50", "2 * 50 = 100", "200 + 100 = 300", "300 - 180 = 120"], "120"
)


@pytest.mark.parametrize(
    ("steps", "first"),
    [
        (
            ["5*2 = 10, 15*2 = 30, 30*2 = 60", "10 + 30 + 60 = 100", "200 + 100 - 180 = 120", "#### 120"],
            -1,
        ),  # another way
        (["5*2 = 10, 15*2 = 30, 30*2 = 60", "10 + 30 + 60 = 110", "200 + 110 - 180 = 130"], 1),  # false arithmetic
        (["5 + 15 + 30 = 50", "50 * 3 = 150", "200 + 150 = 350", "350 - 180 = 170"], 1),  # a value off the way
        (["5 + 15 + 30 = 50", "200 + 50 = 250", "250 - 180 = 70"], 1),
        (["She gets 50 pairs.", "Her 4 sisters take one each.", "That leaves 46."], 1),  # a number from nowhere
        (["5 + 15 = 20", "20 + 30 = 50", "So she has 50 shoes."], 1),  # a value of the way is taken for the answer
        (["Shoes = pairs + old shoes", "Shoes = 50 + 200 = 250", "She has 250."], 0),  # set up before it is evaluated
        (["5 + 15 = 20"], 0),
        ([""], 0),
    ],
)
def test_the_first_wrong_step_is_where_the_chain_leaves_the_way(steps, first):
    judgement = judge_steps(PROBLEM, steps, REFERENCE)
    assert judgement.first_error == first, judgement
    assert judgement.answer_right is (first == -1)
    assert len(judgement.steps) == len(steps)
    if first >= 0:
        assert judgement.steps[first].right is False
        assert judgement.steps[first].reason


def test_the_ways_of_a_reference_are_its_parts_in_any_order():
    way = ways(PROBLEM, REFERENCE.completion)
    for number in (10, 30, 60, 45, 35, 40, 90, 120, 20):
        assert F(number) in way.others or F(number) in way.results, number
    for number in (333, 170, 7):
        assert F(number) not in way.others, number
    assert F("33.3") in Values([F(100, 3)])
    assert F(33) not in Values([F(100, 3)])  # whole numbers are counted, not rounded


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("8 + 9 = 17\n#### 12", 12),
        ("#### $1,234.50 dollars", F("1234.5")),
        (r"\boxed{3} and then \boxed{18} points before scoring 14", 18),
        (r"\boxed{\$70.00}", 70),
        (r"\boxed{43 \text{ minutes}}", 43),
        (r"\boxed{8 \times 9 = 72}", 72),
        ("The answer is 12 apples, out of 40.", 12),
        ("In 4 weeks: 14 + 20 = 34 hours. So she spends 34 hours in 4 weeks.", 34),
        ("She has 5 apples, then 7.", 7),
        (r"\boxed{-5 \text{ degrees}}", -5),
        (r"\boxed{90^\circ}", 90),
        (r"\boxed{\frac{3}{4}} There are 3 left.", F(3, 4)),
        (r"\boxed{2\frac{1}{2}}", F(5, 2)),
        (r"\boxed{\text{18 eggs}}, of 20", 18),
        (r"\boxed{25 \text{ m}^2}", 25),
        (r"\boxed{20\%}", 20),
        (r"\boxed{T - 18}", None),
        (r"So it is \boxed{2x}, with 3.", None),
        ("#### -$5 profit", -5),
        ("**Answer:** 7 apples (from 3 + 4)", 7),
        ("The answer is 12 (5 + 7).", 12),
        ("The answer is found by 5 + 3, which is 8", 8),
        ("So he is owed -$5.", -5),
        ("It is 10-3", 3),
        ("The area is 25 m^2.", 25),
        ("nothing", None),
        ("", None),
    ],
)
def test_the_answer_is_read_where_it_is_stated(text, number):
    assert final_number(text) == number


def test_hostile_text_is_judged():
    for text in (
        "9" * 10**5,
        "{" * 10**5,
        r"\frac{" * 10**4,
        "1=" * 10**4,
        "(" * 10**4,
        "9^{9^{9^9}} = 1",
        "<<" * 10**4,
    ):
        assert len(judge_steps("How many?", [text], REFERENCE).steps) == 1


def test_it_agrees_with_the_labels_of_people(shared_data):
    """ProcessBench: at least 95% of right chains are called right, and F1 with exact first errors is at least 75."""
    path = shared_data / "processbench" / "gsm8k.dev.jsonl"
    if not path.is_file():
        pytest.skip(f"ProcessBench's rows are not in {path}")
    references = {trace.prompt: trace for trace in gsm8k(shared_data)}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    hits = {True: [], False: []}
    for row in rows:
        judgement = judge_steps(row["problem"], row["steps"], references[row["problem"].strip()])
        hits[row["label"] == -1].append(judgement.first_error == row["label"])
    right, wrong = (sum(found) / len(found) for found in (hits[True], hits[False]))
    assert right >= 0.95
    assert 2 * right * wrong / (right + wrong) >= 0.75


def test_solutions_that_people_wrote_are_right(shared_data):
    """As their own references all of them; without, at least 99%: people slip too."""
    traces = gsm8k(shared_data)[::8]
    chains = [trace.completion.splitlines() for trace in traces]
    own = [judge_steps(trace.prompt, chain, trace) for trace, chain in zip(traces, chains, strict=True)]
    assert all(verdict.answer_right and verdict.first_error == -1 for verdict in own)
    alone = [judge_steps(trace.prompt, chain) for trace, chain in zip(traces, chains, strict=True)]
    assert sum(verdict.first_error == -1 for verdict in alone) >= 0.99 * len(traces)


def gsm8k(shared_data: Path) -> list[Trace]:
    texts = [(shared_data / "gsm8k" / f"{part}.jsonl").read_text() for part in ("train", "test")]
    return [GSM8K.trace(json.loads(line), "row") for text in texts for line in text.splitlines()]
