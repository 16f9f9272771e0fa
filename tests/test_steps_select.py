"""Random boundaries are as many as the right ones, elsewhere, and always the same."""

from pathlib import Path

import pytest

from rtd_jax.data.generators.word_problems import generate
from rtd_jax.data.trace import Trace
from rtd_jax.steps.annotated import AnnotatedSegmenter, check_spans
from rtd_jax.steps.select import RandomSegmenter, classifier_folder, make_segmenter


def test_random_boundaries_are_as_many_and_never_where_a_step_ends():
    right, places = AnnotatedSegmenter(), set()
    for trace in generate(60, (1, 3, 6)):
        spans = RandomSegmenter().spans(trace)
        check_spans(spans, trace.completion, trace.source)
        assert len(spans) == trace.depth
        ends = {end for _, end in spans}
        assert not ends & {end for _, end in right.spans(trace)}
        assert spans == RandomSegmenter().spans(trace)
        places.add(spans)
    assert len(places) > 30


def test_steps_of_one_word_leave_no_wrong_place():
    trace = Trace("q", ("one.", "two."), "", "one.\ntwo.")
    assert [end for _, end in RandomSegmenter().spans(trace)] == [4, 9]


def test_a_segmenter_that_does_not_exist_is_refused_by_name():
    assert isinstance(make_segmenter("annotated"), AnnotatedSegmenter)
    with pytest.raises(ValueError, match="'anotated'; use 'annotated', 'random' or 'classifier:<folder>'"):
        make_segmenter("anotated")


def test_a_classifier_is_named_by_its_folder():
    assert classifier_folder("classifier:runs/x/classifier") == Path("runs/x/classifier")
    assert classifier_folder("annotated") is None
    # It has cut the traces by the time they are encoded.
    assert isinstance(make_segmenter("classifier:runs/x"), AnnotatedSegmenter)
    with pytest.raises(ValueError, match="say which classifier"):
        classifier_folder("classifier:")
