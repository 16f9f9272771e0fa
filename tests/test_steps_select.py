"""Random boundaries are as many as the right ones, elsewhere, and always the same."""

import hashlib
from pathlib import Path

import pytest

from rtd_jax.data.generators.word_problems import generate
from rtd_jax.data.trace import Trace
from rtd_jax.steps.select import classifier_folder, random_spans, recut


def test_random_boundaries_are_as_many_and_never_where_a_step_ends():
    traces, places = generate(60, (1, 3, 6)), set()
    cut = recut(traces, "random")  # a trace checks its spans
    for trace, other in zip(traces, cut, strict=True):
        assert (other.depth, other.completion) == (trace.depth, trace.completion)
        assert not {end for _, end in other.spans} & {end for _, end in trace.spans}
        places.add(other.spans)
    assert len(places) > 30
    assert recut(traces, "random") == cut
    # As they were when the published numbers of this control were measured.
    assert hashlib.sha256(repr([trace.spans for trace in cut]).encode()).hexdigest()[:16] == "2adfd031e3f18410"


def test_steps_of_one_word_leave_no_wrong_place():
    trace = Trace.of_steps("q", ("one.", "two."), "", "one.\ntwo.")
    assert [end for _, end in random_spans(trace)] == [4, 9]


def test_a_segmenter_that_does_not_exist_is_refused_by_name():
    assert recut(generate(2), "annotated") == generate(2)
    known = "'annotated', 'random', 'stride:<tokens>', 'soft:<tokens>' or 'classifier:<folder>'"
    with pytest.raises(ValueError, match=f"'anotated'; use {known}"):
        recut(generate(2), "anotated")


def test_a_classifier_is_named_by_its_folder():
    assert classifier_folder("classifier:runs/x/classifier") == Path("runs/x/classifier")
    assert classifier_folder("annotated") is None
    # It has cut the traces by the time they are encoded.
    assert recut(generate(2), "classifier:runs/x") == generate(2)
    with pytest.raises(ValueError, match="say which classifier"):
        classifier_folder("classifier:")
