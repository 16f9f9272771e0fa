"""Reading results and answers: every expected value is read off the text by hand."""

import time
from fractions import Fraction

import pytest

from rtd_jax.apps.traces.select import SelectionSettings, judge
from rtd_jax.base.files import read_jsonl
from rtd_jax.data.schemas.gsm8k import from_gsm8k
from rtd_jax.data.schemas.math import from_math, last_box
from rtd_jax.data.schemas.strategyqa import from_strategyqa
from rtd_jax.data.trace import Problem, Trace, spans_of, stated_answer
from rtd_jax.eval import answers
from rtd_jax.eval.answers import (
    answer_matches,
    flexible_answer,
    parse_number,
    result_span,
    step_result,
    strict_answer,
)
from rtd_jax.eval.chains import check_reference, score_chain
from rtd_jax.teacher.served.requests import Reply


def problem(answer: str, steps: tuple[str, ...] = ("a step",)) -> Trace:
    return Trace.of_steps("question", steps, answer, f"#### {answer}")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        ("18.0", 18),
        ("1,000", 1000),
        ("$1,234.50.", Fraction("1234.5")),
        ("-3", -3),
        ("$-3", -3),
        ("−7", -7),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("0.75", Fraction(3, 4)),
        ("5.", 5),
        (" 12 ", 12),
        ("", None),
        ("..", None),
        ("1/0", None),
        ("12 apples", None),
        ("1.2.3", None),
        ("9" * 5000, None),  # int() would raise beyond 4,300 digits
    ],
)
def test_numbers_are_exact_and_free_of_decoration(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize(
    ("step", "result"),
    [
        ("Natalia sold 48/2 = <<48/2=24>>24 clips in May.", "24"),
        ("<<48/2=24>>24 clips, then <<48+24=72>>72 altogether", "72"),  # the last mark
        ("It is 2*3=6 so <<2*3=6=6.0>>6", "6.0"),  # the last = inside the mark
        ("2 liters * 20% = <<2*20*.01=.4>>.4 liters", ".4"),
        ("the fraction is <<3/4=3/4>>3/4", "3/4"),
        ("profit <<70000-80000=-10000>>-10,000 in 2 years", "-10000"),
        ("<<12>>12 eggs for 3 people", "3"),  # a mark without = concludes nothing
        ("so x = <<a=b>>b with 7 left", "7"),  # nor does one without a number
        ("He pays 3 * $411.50 = $1,234.50.", "$1,234.50"),
        ("The temperature falls to -3 degrees", "-3"),
        ("So 10-3", "3"),  # a subtraction, not a sign
        ("That makes (10)-3", "3"),
        ("He owes -$5.", "-$5"),
        ("lists 1,2,3", "3"),
        ("1,234,567 people", "1,234,567"),
        ("grows by 12.5%", "12.5"),
        ("an unfinished mark <<5+5=10", "10"),
    ],
)
def test_a_step_concludes_the_last_mark_or_else_the_last_number(step, result):
    span = result_span(step)
    assert span is not None
    assert step[slice(*span)] == result


def test_a_step_may_conclude_nothing():
    assert result_span("She sleeps.") is None
    assert step_result("She sleeps.") is None
    assert step_result("<<1/0=1/0>>") is None


def test_equal_results_in_different_dress():
    assert step_result("<<411.5*3=1234.5>>") == step_result("He pays $1,234.50.") == Fraction(2469, 2)


def test_gsm8k_patterns_read_as_the_harness_reads():
    # Expected values: the two patterns of lm_eval/tasks/gsm8k/gsm8k.yaml, first match and last match.
    assert strict_answer("so 5\n#### 1,234.50.\n#### 9") == "1,234.50."
    assert strict_answer("#### -12 apples") == "-12"
    assert strict_answer("####72") is None
    assert strict_answer("#### $72") is None
    assert flexible_answer("He has $1,234.50 left, 3 more") == "3"
    assert flexible_answer("It costs $18.") == "$18."
    assert flexible_answer("no number") is None


@pytest.mark.parametrize(
    ("answer", "text", "strict", "flexible"),
    [
        ("72", "48+24=72\n#### 72", True, True),
        ("72", "48+24=72\n#### 72.00", True, True),
        ("1,234.50", "#### 1234.5.", True, True),
        ("1000", "It is $1,000.", False, True),  # missing ####
        ("-3", "#### -3", True, True),
        ("3", "#### -3", False, False),
        ("72", "#### 72\n#### 5", True, False),
        ("72", "#### 71", False, False),
        ("72", "", False, False),
        ("72", "#### ", False, False),
        ("yes", "It floats, so yes it can.", False, True),
        ("yes", "#### yes", True, True),
        ("yes", "#### True.", True, True),
        ("no", "Yes, it seems.\n#### no", True, True),
        ("no", "I know nothing", False, False),  # "no" is a word of its own
        ("B", "#### B", True, True),
        ("B", "the answer is (B)", False, True),
        ("A", "A dog is not a plant. The answer is A", False, True),
        ("A", "A dog is not a plant.", False, False),  # the article is no choice
        ("B", "#### C", False, False),
        (r"\frac{3}{4}", r"so the answer is $\boxed{\dfrac{3}{4}}$.", True, True),
        (r"\frac{3}{4}", r"#### $\frac{3}{4}$", True, True),
        (r"\frac{3}{4}", r"so \boxed{\frac{4}{3}}", False, False),
        (r"\frac{3}{4}", r"so \boxed{\frac{3}{4}", False, True),  # math-verify reads on where a brace is missing
        (r"(-\infty,2)\cup(2,\infty)", r"so \boxed{x \ne 2}", False, False),
        (r"[2,5)", r"the domain is $\boxed{[2, 5)}$", True, True),
        (r"\frac{3}{4}", r"so it is $\frac{6}{8}$.", False, True),
        (r"\frac{3}{4}", r"Then it is 0.75.", False, True),
    ],
)
def test_answers_match_by_kind(answer, text, strict, flexible):
    assert answer_matches(problem(answer), text)[:2] == (strict, flexible)


def test_a_chain_without_an_answer_answers_with_its_last_result():
    trace = Trace.of_steps("question", ("2+2=4", "4*3=12"), "", "")
    assert answer_matches(trace, "2+2=4\n4*3 is 12.")[:2] == (True, True)
    assert answer_matches(trace, "2+2=4\n4*3=11")[:2] == (False, False)
    assert answer_matches(trace, "")[:2] == (False, False)


def test_boxed_keeps_nested_braces():
    assert last_box(r"first \boxed{1} then \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert last_box("none") is None


MATH_TEXTS = [
    (r"Adding, $\boxed{16}$.", True, True, True),
    (r"$$\begin{align*} n &= 480/30 = \boxed{16} \end{align*}$$", True, True, True),
    ("Final Answer: The final answer is $16$. I hope it is correct.", True, True, True),
    ("so it is $2^4$", False, True, True),  # math-verify reads on where nothing is boxed
    (r"first $\boxed{16}$, no: $\boxed{15}$", False, False, False),
    ("#### 16", True, True, True),
    ("480 = 30 * 16 and 14 more", False, False, False),
]


@pytest.mark.parametrize(("text", "strict", "flexible", "verified"), MATH_TEXTS)
def test_a_number_that_a_solution_boxes_is_an_expression(text, strict, flexible, verified):
    # MATH has no #### line, also where its answer is a number.
    trace = Trace.of_steps("problem", (r"So $480/30 = \boxed{16}$.",), "16")
    assert answer_matches(trace, text) == (strict, flexible, verified)


def test_an_answer_that_sympy_cannot_finish_is_wrong_after_a_while(monkeypatch):
    monkeypatch.setattr(answers, "_VERIFY_SECONDS", 1)
    trace = Trace.of_steps("problem", (r"So $\boxed{\frac{1}{2}}$.",), r"\frac{1}{2}")
    start = time.monotonic()
    assert answer_matches(trace, r"$\boxed{9^{9^{9^{9}}} + \frac{1}{2}}$") == (False, False, False)
    assert time.monotonic() - start < 30


WRITTEN = [
    *("3/4", "-3/4", "3 1/2", "3 / 4", "2/4", "1 000", "1\u202f000", "12 345 678", "1,000", "-3", "−3", "–3", "- 3"),
    *("3½", "$5", "-$5", "$ 5", "$70.00", "€5", "5 €", "72.", "72.0", "1e3", "½", "７２", "0", "-0", "50%", "#5"),
    *("5 apples", "12,5", "1 2", "10^2", "1:30", "1.000.000", "9" * 300, "YES", "Yes.", "no", "(B)", "b", "B", "J"),
    *("x > 1", r"\dfrac{1}{2}", r"\text{yes}", r"$\frac{3}{4}$", r"\boxed{5}", "..."),
]


@pytest.mark.parametrize("answer", WRITTEN)
def test_a_reference_judges_itself_right_however_its_answer_is_written(answer):
    trace = Trace.of_steps("question", ("It is 2 or 7.",), answer, f"#### {answer}")
    assert answer_matches(trace, trace.completion)[:2] == (True, True)
    assert score_chain(trace.completion, trace)["correct"]
    asked, reply = Problem("question", answer), Reply(f"It is 2.\n#### {answer}", "stop")
    assert judge(asked, reply, SelectionSettings("strict"))[0] == "kept"
    assert judge(asked, reply, SelectionSettings("flexible"))[0] == "kept"


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"So it is \fbox{12}.", "12"),
        (r"So $\boxed 5$.", "5"),
        (r"So \boxed 5.", "5"),
        (r"Get $\boxed{\left\{ x > 1 \right.}$.", r"\left\{ x > 1 \right."),
        (r"First \boxed{1}, then \fbox{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{a \\ {b}}", r"a \\ {b}"),  # two backslashes are a new line, and the brace after them groups
        (r"It is $\boxed{16}$, not #### 5", "16"),
    ],
)
def test_a_box_is_read_alike_in_references_and_replies(solution, answer):
    trace = from_math({"problem": "p", "solution": solution})
    assert trace.answer == answer == last_box(solution)
    assert score_chain(solution, trace)["correct"]
    assert answer_matches(trace, "Therefore $" + solution + "$").strict


@pytest.mark.parametrize(
    ("answer", "text", "strict", "flexible"),
    [
        ("3/4", "#### 3", False, False),
        ("3", "#### 3/4", False, False),
        ("7/2", "#### 3 1/2 cups", True, True),
        ("3.5", "That makes 3½ cups.", False, True),
        ("31/2", "#### 3 1/2", False, False),
        ("-5", "He owes -$5", False, True),
        ("-3", "#### −3", True, True),
        ("3", "#### −3", False, True),  # the harness' flexible reading does not know this minus
        ("24", "48-24", False, False),  # and takes this one for a sign
        ("12", "#### 12 apples", True, True),
        ("12", "12 apples ...", False, False),  # the harness takes the dots for a number
        ("72", "##### 72", False, True),  # a heading
        ("5", r"The final answer is $\boxed{5}$.", False, True),  # Llama-3.1's own words
        ("1/2", "So it is $1/2$, or one half.", False, True),
        ("5", r"It is $$\boxed{6}$$.", False, False),
    ],
)
def test_numbers_are_read_whole(answer, text, strict, flexible):
    assert answer_matches(problem(answer), text)[:2] == (strict, flexible)


@pytest.mark.parametrize(
    "steps",
    [("So it floats.",), ("2+2=4", "It is blue."), ("x = 5\nas desired.",), ("a = 1.\n\nb = 2,\nwhich ends it.",)],
)
def test_a_chain_without_an_answer_of_its_own_judges_itself_right(steps):
    trace = Trace.of_steps("question", steps, "")
    assert score_chain(trace.completion, trace)["correct"]
    assert not score_chain("It is 17.", trace)["correct"]


def test_steps_that_share_a_line_are_judged_by_their_lines():
    body = "a = 1. b = 2.\nc = 3"
    trace = Trace("question", body, spans_of(body, (6, 13)), "3", "#### 3")
    assert score_chain(trace.completion, trace)["chain_exact"]
    assert not score_chain("a = 1. b = 4.\nc = 3\n#### 3", trace)["chain_exact"]


def test_a_heading_of_four_is_no_answer():
    text = "#### Step 1: pack\n9 + 9 = 18\n#### **Step 2**\nDone.\n#### 18"
    assert stated_answer(text) == "18"
    assert stated_answer("#### Step 1\nIt is 18.") == ""
    assert stated_answer("so #### Part two\nand #### 18") == "18"
    assert stated_answer("#### stepladder") == "stepladder"


def test_a_reference_that_states_two_answers_is_refused_by_name():
    row = {"question": "q", "answer": "Try.\n#### 4\nNo: 5.\n#### 5"}
    with pytest.raises(ValueError, match=r"train.jsonl:7: 'answer' states an answer twice: '#### 4' stands before"):
        from_gsm8k(row, "train.jsonl:7")
    trace = Trace.of_steps("q", ("#### 4", "No: 5."), "5", "#### 5", "steps.jsonl:3")
    with pytest.raises(ValueError, match=r"steps.jsonl:3: its answer is '5', but its own text is read as '#### 4'"):
        score_chain("anything", trace)
    with pytest.raises(ValueError, match=r"chat.jsonl:2: its answer is"):
        check_reference(Problem("q", "two\nlines", source="chat.jsonl:2"))


def test_published_rows_judge_themselves_right(shared_data):
    rows = {"gsm8k": ("test.jsonl", from_gsm8k), "strategyqa": ("train.jsonl", from_strategyqa)}
    for name, (file, read) in rows.items():
        for place, row in read_jsonl(shared_data / name / file):
            trace = read(row, place)
            assert score_chain(trace.completion, trace)["correct"], place


def test_a_text_stuck_in_a_mark_is_read_once_and_not_once_for_every_mark():
    """A model that repeats "<<" to its last token: at a quadratic cost this would take minutes."""
    assert step_result("<<" * 200_000 + "1+1=2>>2") == 2
    assert step_result("<<" * 200_000) is None
    assert step_result("so <<5 <<1+1=2>>3") == step_result("<<<1+1=2>>3") == 2
