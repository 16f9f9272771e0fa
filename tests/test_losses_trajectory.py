"""Alignment and coherence: values worked by hand, and properties that hold for any input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtd_jax.losses import alignment, boundary_losses, coherence, transition_losses, transition_mask


def _states(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def test_coherence_by_hand():
    # Student deltas (1, 0), (0, 1); teacher deltas (1, 0), (1, 1). cos = 1 and 1/sqrt(2).
    student = jnp.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    teacher = jnp.array([[5.0, 5.0], [6.0, 5.0], [7.0, 6.0]])
    mask = jnp.ones(3, bool)
    expected = [0.0, (1 - 1 / np.sqrt(2)) ** 2]
    np.testing.assert_allclose(transition_losses(student, teacher, mask), expected, atol=1e-7)
    np.testing.assert_allclose(coherence(student, teacher, mask), np.mean(expected), atol=1e-7)


def test_lengths_count_in_the_squared_distance_of_transitions():
    # Student deltas (2, 0), (0, 1); teacher deltas (1, 0), (3, 4): errors 1 / 1 and (9 + 9) / 25.
    student = jnp.array([[0.0, 0.0], [2.0, 0.0], [2.0, 1.0]])
    teacher = jnp.array([[5.0, 5.0], [6.0, 5.0], [9.0, 9.0]])
    mask = jnp.ones(3, bool)
    found = transition_losses(student, teacher, mask, distance="squared")
    np.testing.assert_allclose(found, [1.0, 18 / 25], rtol=1e-6)
    half = transition_losses(student, teacher, mask, jnp.diag(jnp.array([0.5, 1.0])), "squared")
    np.testing.assert_allclose(half, [0.0, 18 / 25], rtol=1e-6)
    # Masked and still teachers: nothing, and no NaN in the gradient.
    still, masked = jnp.zeros((3, 2)), jnp.array([True, True, False])
    dirty = jnp.where(masked[:, None], student, jnp.nan)

    def total(states, targets, keep):
        return jnp.sum(transition_losses(states, targets, keep, distance="squared"))

    np.testing.assert_array_equal(jax.grad(total)(student, still, mask), 0.0)
    gradient = jax.grad(total)(dirty, teacher, masked)
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(gradient[2], 0.0)
    np.testing.assert_array_equal(transition_losses(student, still, mask, distance="squared"), 0.0)


def test_alignment_by_hand():
    # cos of (1, 0) with (0, 2), (3, 0), (-1, 0) is 0, 1, -1.
    student = jnp.array([[1.0, 0.0]] * 3)
    teacher = jnp.array([[0.0, 2.0], [3.0, 0.0], [-1.0, 0.0]])
    mask = jnp.ones(3, bool)
    np.testing.assert_allclose(boundary_losses(student, teacher, mask), [1.0, 0.0, 2.0], atol=1e-7)
    np.testing.assert_allclose(alignment(student, teacher, mask), 1.0, atol=1e-7)


def test_lengths_count_in_the_squared_distance_of_states():
    # (2, 0) to (1, 0): 1 / 1; (0, 1) to (3, 4): (9 + 9) / 25.
    student, teacher = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [3.0, 4.0]])
    mask = jnp.ones(2, bool)
    found = boundary_losses(student, teacher, mask, distance="squared")
    np.testing.assert_allclose(found, [1.0, 18 / 25], rtol=1e-6)
    np.testing.assert_allclose(alignment(student, teacher, mask, distance="squared"), (1 + 18 / 25) / 2, rtol=1e-6)
    half = boundary_losses(student, teacher, mask, jnp.diag(jnp.array([0.5, 1.0])), "squared")
    np.testing.assert_allclose(half, [0.0, 18 / 25], rtol=1e-6)
    for scale in (1e-30, 1e30):
        states = scale * student, scale * teacher, mask
        np.testing.assert_allclose(boundary_losses(*states, distance="squared"), found, rtol=1e-5)
    # Masked slots may hold NaN, and a teacher without length has no direction and no unit.
    dirty = jnp.array([[2.0, 0.0], [jnp.nan, 1.0]])
    gradient = jax.grad(lambda x: alignment(x, dirty, jnp.array([True, False]), distance="squared"))(dirty)
    np.testing.assert_array_equal(gradient, 0.0)
    np.testing.assert_array_equal(boundary_losses(student, jnp.zeros((2, 2)), mask, distance="squared"), 0.0)


def test_mean_is_over_chains_not_over_transitions():
    # Chain one: 2 transitions with loss 1 each (orthogonal). Chain two: 1 transition with loss 4 (opposite). Chain
    # three has one boundary, so no transition, and must not count. Mean over chains (1 + 4) / 2, not 6 / 3.
    student = jnp.array(
        [[[0.0, 0], [1, 0], [2, 0]], [[0, 0], [1, 0], [9, 9]], [[1, 1], [0, 0], [0, 0]]],
    )
    teacher = jnp.array(
        [[[0.0, 0], [0, 1], [0, 2]], [[0, 0], [-1, 0], [7, 7]], [[1, 1], [0, 0], [0, 0]]],
    )
    mask = jnp.array([[True, True, True], [True, True, False], [True, False, False]])
    np.testing.assert_allclose(coherence(student, teacher, mask), 2.5, atol=1e-6)


def test_zero_when_equal_and_scale_free():
    states, mask = _states(0, 4, 5, 8), jnp.ones((4, 5), bool)
    assert float(coherence(states, states, mask)) < 1e-10
    np.testing.assert_allclose(alignment(states, 7.0 * states, mask), 0.0, atol=1e-6)
    other = _states(1, 4, 5, 8)
    np.testing.assert_allclose(coherence(states, other, mask), coherence(3.0 * states, other, mask), rtol=1e-5)
    # A constant offset of all states changes the waypoints, not the transitions.
    np.testing.assert_allclose(coherence(states + 10.0, other, mask), coherence(states, other, mask), rtol=1e-4)


@pytest.mark.parametrize("loss", [alignment, coherence])
def test_padding_never_matters(loss):
    """Value and gradient with masked slots equal those of the subset alone, whatever the masked slots hold."""
    student, teacher, projection = _states(0, 2, 4, 6), _states(1, 2, 4, 10), _states(2, 6, 10)
    mask = jnp.array([[True, True, True, False], [True, True, False, False]])
    dirty_student = jnp.where(mask[..., None], student, jnp.nan)
    dirty_teacher = jnp.where(mask[..., None], teacher, jnp.inf)
    chains = [loss(student[0, :3], teacher[0, :3], mask[0, :3], projection)]
    chains.append(loss(student[1, :2], teacher[1, :2], mask[1, :2], projection))
    value, gradients = jax.value_and_grad(loss, argnums=(0, 3))(dirty_student, dirty_teacher, mask, projection)
    np.testing.assert_allclose(value, np.mean(chains), rtol=1e-6)
    clean = jax.grad(loss, argnums=(0, 3))(student, teacher, mask, projection)
    for got, expected in zip(gradients, clean, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert np.all(np.asarray(gradients[0])[~np.asarray(mask)] == 0)


@pytest.mark.parametrize("loss", [alignment, coherence])
def test_zero_vectors_and_empty_batches_give_zero(loss):
    """The gradient of a norm at zero is NaN; identical consecutive states and all-masked batches must not make one."""
    teacher = _states(1, 2, 3, 4)
    for student, mask in [
        (jnp.zeros((2, 3, 4)), jnp.ones((2, 3), bool)),
        (_states(0, 2, 3, 4), jnp.zeros((2, 3), bool)),
    ]:
        value, gradient = jax.value_and_grad(loss)(student, teacher, mask)
        assert float(value) == 0.0
        np.testing.assert_array_equal(gradient, jnp.zeros_like(student))


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_extreme_lengths_keep_value_and_gradient(scale):
    student, teacher, mask = _states(0, 3, 4), _states(1, 3, 4), jnp.ones(3, bool)
    value, gradient = jax.value_and_grad(boundary_sum)(student * scale, teacher, mask)
    expected, expected_gradient = jax.value_and_grad(boundary_sum)(student, teacher, mask)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient * scale, expected_gradient, rtol=1e-3, atol=1e-5)


def boundary_sum(student, teacher, mask):
    return jnp.sum(boundary_losses(student, teacher, mask))


def test_gradient_against_float64_finite_differences():
    """The gradient of the whole formula, against a NumPy float64 transcription differentiated numerically."""
    student, teacher = np.asarray(_states(0, 3, 2, 4), np.float64), np.asarray(_states(1, 3, 2, 5), np.float64)
    projection = np.asarray(_states(2, 4, 5), np.float64)

    def reference(student):
        delta_s, delta_t = (student[:, 1] - student[:, 0]) @ projection, teacher[:, 1] - teacher[:, 0]
        cos = np.sum(delta_s * delta_t, -1) / np.linalg.norm(delta_s, axis=-1) / np.linalg.norm(delta_t, axis=-1)
        return np.mean((1 - cos) ** 2)

    numeric = np.zeros_like(student)
    for index in np.ndindex(student.shape):
        step = np.zeros_like(student)
        step[index] = 1e-6
        numeric[index] = (reference(student + step) - reference(student - step)) / 2e-6
    mask = jnp.ones((3, 2), bool)
    arrays = [jnp.asarray(x, jnp.float32) for x in (student, teacher, projection)]
    value, gradient = jax.value_and_grad(lambda s: coherence(s, arrays[1], mask, arrays[2]))(arrays[0])
    np.testing.assert_allclose(value, reference(student), rtol=1e-5)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-3, atol=1e-5)


def test_works_under_jit_vmap_and_bfloat16():
    student, teacher, mask = _states(0, 3, 4, 6), _states(1, 3, 4, 6), jnp.ones((3, 4), bool)
    per_chain = jax.jit(jax.vmap(coherence))(student, teacher, mask)
    np.testing.assert_allclose(jnp.mean(per_chain), coherence(student, teacher, mask), rtol=1e-6)
    half = coherence(student.astype(jnp.bfloat16), teacher.astype(jnp.bfloat16), mask)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, coherence(student, teacher, mask), rtol=3e-2)


def test_projection_may_be_a_matrix_or_a_function():
    student, teacher, projection = _states(0, 4, 6), _states(1, 4, 3), _states(2, 6, 3)
    mask = jnp.ones(4, bool)
    np.testing.assert_allclose(
        coherence(student, teacher, mask, projection),
        coherence(student, teacher, mask, lambda x: x @ projection),
        rtol=1e-5,
    )


def test_width_mismatch_says_what_to_pass():
    with pytest.raises(ValueError, match=r"student width 6, teacher width 3: pass a projection, a \[6, 3\] matrix"):
        alignment(_states(0, 4, 6), _states(1, 4, 3), jnp.ones(4, bool))
    with pytest.raises(ValueError, match=r"projection has shape \(3, 6\)"):
        coherence(_states(0, 4, 6), _states(1, 4, 3), jnp.ones(4, bool), _states(2, 3, 6))


def test_transition_needs_both_ends():
    mask = jnp.array([True, False, True, True, False])
    np.testing.assert_array_equal(transition_mask(mask), [False, False, True, False])
