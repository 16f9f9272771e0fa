"""Boundaries after every so many tokens: trajectories that need no steps."""

import numpy as np
import pytest

from configs.rtd_tiny import get_config
from rtd_jax.base.settings import build
from rtd_jax.data.encoding import EncodedChain
from rtd_jax.data.generators.word_problems import generate
from rtd_jax.data.packing import fixed_batches
from rtd_jax.data.sources import SourceSettings
from rtd_jax.data.tiny_tokenizer import TINY_FORMAT, tiny_tokenizer
from rtd_jax.steps.select import in_windows, recut, stride_of, window_ends
from rtd_jax.train.recipe import DataSettings, Recipe
from rtd_jax.train.splits import encode_split


@pytest.mark.parametrize(
    ("prompt", "length", "stride", "ends"),
    [
        (3, 10, 4, [2, 6, 9]),
        (3, 11, 4, [2, 6, 10]),  # the last window is full
        (3, 10, 100, [2, 9]),
        (3, 10, 1, [2, 3, 4, 5, 6, 7, 8, 9]),
        (0, 0, 4, [-1]),  # nothing was written
    ],
)
def test_windows_begin_behind_the_prompt_and_the_last_ends_with_the_chain(prompt, length, stride, ends):
    assert window_ends(prompt, length, stride).tolist() == ends


def test_windows_change_boundaries_and_nothing_else():
    chain = EncodedChain(
        np.arange(10, dtype=np.int32), 3, np.array([2, 5, 9]), np.float32([0] * 3 + [1] * 7), "x", np.zeros(10, int)
    )
    (cut,) = in_windows([chain], 4)
    assert cut.boundaries.tolist() == [2, 6, 9]
    assert cut.boundaries.dtype == np.int32
    assert cut.conclusions is None
    assert (cut.prompt_length, cut.source) == (3, "x")
    np.testing.assert_array_equal(cut.tokens, chain.tokens)
    np.testing.assert_array_equal(cut.loss_weights, chain.loss_weights)


def test_a_split_in_windows_keeps_the_depths_of_its_steps():
    """The curriculum and the evaluation go on counting steps."""
    source = SourceSettings("synthetic", "", "train", limit=8, depths=(1, 3))
    data = DataSettings(train=source, test=source, text=TINY_FORMAT, segmentation="stride:8", row_length=128)
    traces, tokenizer = generate(8, (1, 3)), tiny_tokenizer()
    split = encode_split(traces, data, tokenizer)
    assert {trace.depth for trace in split.traces} == {1, 3}
    for chain in split.encoded:
        assert set(np.diff(chain.boundaries)[:-1].tolist()) <= {8}
        assert chain.boundaries[-1] == len(chain) - 1
    slots = max(len(chain.boundaries) for chain in split.encoded)
    (batch, *_) = fixed_batches(split.encoded, 8, 128, 1, slots)
    np.testing.assert_array_equal(batch.boundary_mask_BCK.sum(-1)[:, 0], [len(x.boundaries) for x in split.encoded])


@pytest.mark.parametrize("segmentation", ["stride:", "stride:0", "stride:x", "stride:-4"])
def test_a_stride_that_is_no_number_of_tokens_is_refused(segmentation):
    with pytest.raises(ValueError, match=r"say how many tokens a window has, e\.g\. 'stride:16'"):
        stride_of(segmentation)


def test_other_segmentations_have_no_stride():
    assert [stride_of(x) for x in ("annotated", "random", "classifier:x", "stride:12")] == [0, 0, 0, 12]
    with pytest.raises(ValueError, match=r"use .* 'stride:<tokens>', 'soft:<tokens>' or 'classifier:<folder>'"):
        recut([], "strides:3")


def test_drift_by_steps_is_refused_of_a_cache_that_has_the_states_of_windows():
    values = get_config()
    values.update_from_flattened_dict(
        {"data.segmentation": "stride:8", "teacher.cache": "x", "evaluation.drift_problems": 4}
    )
    values.evaluation.teacher = False
    with pytest.raises(ValueError, match=r"the teacher's cache has the states of windows; set .*drift_problems=0"):
        build(Recipe, values.to_dict())
    values.evaluation.drift_problems = 0
    assert build(Recipe, values.to_dict()).data.segmentation == "stride:8"
