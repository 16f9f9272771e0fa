"""Reading results and answers: every expected value is read off the text by hand."""

import time
from fractions import Fraction

import pytest

from rtd_jax.data.trace import Trace
from rtd_jax.eval import answers
from rtd_jax.eval.answers import (
    answer_matches,
    boxed,
    flexible_answer,
    parse_number,
    result_span,
    step_result,
    strict_answer,
)


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
    assert boxed(r"first \boxed{1} then \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert boxed("none") is None


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
