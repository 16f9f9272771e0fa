"""Character spans of annotated steps; expected by hand."""

import pytest

from rtd_jax.data.generators.word_problems import generate
from rtd_jax.data.trace import Trace
from rtd_jax.steps.annotated import AnnotatedSegmenter, Segmenter, check_spans


def test_spans_by_hand():
    trace = Trace("p", ("One.", " two  ", "One."), "1", "#### 1")
    assert trace.completion == "One.\n two  \nOne.\n#### 1"
    assert AnnotatedSegmenter().spans(trace) == ((0, 4), (6, 9), (12, 16))


def test_a_repeated_step_is_found_in_its_own_place():
    trace = Trace("p", ("a", "a b", "a", "b"), "b")
    assert AnnotatedSegmenter().spans(trace) == ((0, 1), (2, 5), (6, 7), (8, 9))


def test_spans_give_the_steps_and_leave_the_answer_line_out():
    for trace in generate(30):
        spans = AnnotatedSegmenter().spans(trace)
        assert tuple(trace.completion[start:end] for start, end in spans) == trace.steps
        assert trace.completion[spans[-1][1] :] == f"\n{trace.final}"
        check_spans(spans, trace.completion)


def test_it_is_a_segmenter():
    assert isinstance(AnnotatedSegmenter(), Segmenter)
    assert not isinstance(object(), Segmenter)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ((), "f:1: the segmenter found no steps"),
        (((0, 2), (1, 3)), r"f:1: span 2 is \(1, 3\); expected 2 <= start < end <= 5"),
        (((2, 2),), r"f:1: span 1 is \(2, 2\)"),
        (((0, 6),), r"f:1: span 1 is \(0, 6\)"),
        (((0, 3),), "f:1: span 1 begins or ends with white space: 'ab '"),
    ],
)
def test_a_segmenter_that_breaks_the_protocol_is_named(spans, message):
    with pytest.raises(ValueError, match=message):
        check_spans(spans, "ab cd", "f:1")
