"""One text and the spans of its steps; expected by hand."""

import dataclasses

import pytest

from rtd_jax.data.generators.word_problems import generate
from rtd_jax.data.trace import Trace, check_spans, split_answer


def test_spans_by_hand():
    trace = Trace.of_steps("p", ("One.", " two  ", "One."), "1", "#### 1")
    assert trace.completion == "One.\n two  \nOne.\n#### 1"
    assert trace.spans == ((0, 4), (6, 9), (12, 16))
    assert trace.steps == ("One.", "two", "One.")
    assert trace.depth == 3


def test_a_repeated_step_has_its_own_place():
    trace = Trace.of_steps("p", ("a", "a b", "a", "b"), "b")
    assert trace.spans == ((0, 1), (2, 5), (6, 7), (8, 9))
    assert trace.completion == trace.body == "a\na b\na\nb"


def test_spans_give_the_steps_and_leave_the_answer_line_out():
    for trace in generate(30):
        assert tuple(trace.completion[start:end] for start, end in trace.spans) == trace.steps
        assert trace.completion[trace.spans[-1][1] :] == f"\n{trace.final}"
        check_spans(trace.spans, trace.completion.removesuffix(trace.final))


def test_a_trace_is_cut_anew_by_other_spans_of_the_same_text():
    trace = Trace("p", "a b a b", ((0, 7),), "", "#### 1")
    assert dataclasses.replace(trace, spans=((0, 3), (4, 7))).steps == ("a b", "a b")
    assert dataclasses.replace(trace, spans=((0, 1),)).steps == ("a",)  # words behind the last step, as random cuts do
    with pytest.raises(ValueError, match=r"trace: span 1 is \(0, 9\)"):
        dataclasses.replace(trace, spans=((0, 9),))  # the final line is no step


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ((), "f:1: the chain is empty; expected at least one reasoning step"),
        (((0, 2), (1, 3)), r"f:1: span 2 is \(1, 3\); expected 2 <= start < end <= 5"),
        (((2, 2),), r"f:1: span 1 is \(2, 2\)"),
        (((0, 6),), r"f:1: span 1 is \(0, 6\)"),
        (((0, 3),), "f:1: span 1 begins or ends with white space: 'ab '"),
        (((1, 5),), "f:1: 'a' lies before span 1 and in no other; expected only white space between steps"),
        (((0, 1), (3, 5)), "f:1: 'b' lies before span 2 and in no other"),
    ],
)
def test_spans_that_cannot_be_steps_are_named(spans, message):
    with pytest.raises(ValueError, match=message):
        check_spans(spans, "ab cd", "f:1")
    with pytest.raises(ValueError, match=message):
        Trace("p", "ab cd", spans, "", source="f:1")


def test_blank_prompts_and_steps_are_named():
    with pytest.raises(ValueError, match="f:1: the prompt is empty"):
        Trace.of_steps(" ", ("a",), "", source="f:1")
    with pytest.raises(ValueError, match="f:1: step 2 of 3 is blank"):
        Trace.of_steps("p", ("a", " ", "b"), "", source="f:1")
    with pytest.raises(ValueError, match="trace: the chain is empty"):
        Trace.of_steps("p", (), "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" One.\nTwo.\n#### 72 \n", ("One.\nTwo.", "72")),
        ("####72", ("", "72")),
        ("#### 7\nOne.", ("#### 7\nOne.", "")),
        ("One.\n#### ", ("One.\n####", "")),
        (" \n", ("", "")),
    ],
)
def test_the_last_line_may_state_the_answer(text, expected):
    assert split_answer(text) == expected
