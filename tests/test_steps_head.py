"""Features and network: values by hand, and no chain sees another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtd_jax.steps.head import (
    HeadSettings,
    Scale,
    boundary_logits,
    boundary_loss,
    init_head,
    measure_scale,
    neighbours,
    turns,
)

logits_of = jax.jit(boundary_logits, static_argnums=0)


def random_head(head: HeadSettings, layers: int, width: int):
    """Params away from their start, where every logit is 0, and a scale that does something."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_head(head, layers, width))
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    scale = Scale(rng.normal(size=(layers, width)).astype(np.float32), np.full((layers, width), 2.0, np.float32))
    return head, params, scale


def test_neighbours_stop_at_the_chain_and_at_the_row():
    x = np.array([[1.0, 2.0, 3.0, 4.0, 5.0]])
    ids = np.array([[1, 1, 2, 2, 0]])
    np.testing.assert_array_equal(neighbours(x, ids, 1), [[2, 0, 4, 0, 0]])
    np.testing.assert_array_equal(neighbours(x, ids, -1), [[0, 1, 0, 3, 0]])
    np.testing.assert_array_equal(neighbours(x, ids, 2), [[0, 0, 0, 0, 0]])
    # The first and last token of a row do not meet, though rolling puts them side by side.
    np.testing.assert_array_equal(neighbours(x, np.ones((1, 5), int), 1), [[2, 3, 4, 5, 0]])


def test_turns_of_a_path_that_goes_straight_turns_and_comes_back():
    # Right, right, up, down: cosines 1, 0, -1; the first token has no difference, the last nothing after it.
    path = np.array([[0, 0], [1, 0], [3, 0], [3, 2], [3, 1]], float)[None, :, None]
    d, straight = turns(path, np.ones((1, 5), int))
    np.testing.assert_array_equal(d[0, :, 0], [[0, 0], [1, 0], [2, 0], [0, 2], [0, -1]])
    np.testing.assert_allclose(straight[0, :, 0], [0, 1, 0, -1, 0], atol=1e-7)


def test_a_trajectory_that_stands_still_has_a_finite_gradient():
    states = jnp.ones((1, 4, 2, 3))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(turns(x, jnp.ones((1, 4), int))[1])))(states)
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_packed_chains_have_the_logits_that_they_have_alone():
    rng = np.random.default_rng(0)
    head = random_head(HeadSettings(width=8, dilations=(1, 3)), 2, 4)
    first, second = rng.normal(size=(5, 2, 4)), rng.normal(size=(5, 2, 4))
    packed = np.concatenate([first, second, rng.normal(size=(2, 2, 4))])[None]
    ids = np.array([[1] * 5 + [2] * 5 + [0] * 2])
    together = logits_of(*head, packed, ids)
    for states, part in ((first, slice(0, 5)), (second, slice(5, 10))):
        alone = logits_of(*head, states[None], np.full((1, 5), 9))
        np.testing.assert_allclose(together[0, part], alone[0], atol=1e-5)
        assert np.std(alone) > 1e-3  # not the same by being nothing


def test_the_head_looks_ahead_as_far_as_its_dilations():
    """Causal states cannot know that a step follows; the states of the next tokens can. The cosine adds one token."""
    states = np.random.default_rng(0).normal(size=(1, 8, 1, 4))
    changed = states.copy()
    changed[0, 6] += 1.0
    for dilations, reach in (((), 1), ((1, 2), 4)):
        head = random_head(HeadSettings(width=8, dilations=dilations), 1, 4)
        before, after = (np.asarray(logits_of(*head, x, np.ones((1, 8), int)))[0] for x in (states, changed))
        differs = np.flatnonzero(np.abs(before - after) > 1e-4)
        assert differs.min() == 6 - reach


def test_loss_weighs_boundaries_and_ignores_what_is_not_counted():
    logits = jnp.log(jnp.array([[3.0, 1.0, 1.0]]))  # probabilities 3/4, 1/2, 1/2
    labels, counted = np.array([[True, False, True]]), np.array([[True, True, False]])
    # (2 * ln 4/3 + 1 * ln 2) / 3
    np.testing.assert_allclose(
        boundary_loss(logits, labels, counted, 2.0), (2 * np.log(4 / 3) + np.log(2)) / 3, rtol=1e-6
    )
    gradient = jax.grad(lambda x: boundary_loss(x, labels, counted, 2.0))(logits)
    assert gradient[0, 2] == 0
    assert boundary_loss(logits, labels, np.zeros_like(counted), 2.0) == 0


def test_scale_is_of_all_tokens_and_never_zero():
    scale = measure_scale([np.array([[[1.0, 5.0]]]), np.array([[[3.0, 5.0]]])])
    np.testing.assert_allclose(scale.mean_ND, [[2, 5]])
    np.testing.assert_allclose(scale.deviation_ND, [[1, 1e-3]])


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match=r"dilations\[0\] is 0; expected 1 to"):
        HeadSettings(dilations=(0,))
    with pytest.raises(ValueError, match=r"dropout is 1\.0"):
        HeadSettings(dropout=1.0)
