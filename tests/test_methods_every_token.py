"""Token alignment and intermediate matching against numbers worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtd_jax.base.means import safe_divide
from rtd_jax.base.types import Batch, StudentOutputs, TeacherOutputs
from rtd_jax.losses.hints import hint_losses
from rtd_jax.methods.intermediate import Intermediate
from rtd_jax.methods.term import Outputs
from rtd_jax.methods.token_alignment import TokenAlignment


def batch(loss_weights, chain_ids):
    shape = np.shape(chain_ids)
    zeros = np.zeros(shape, np.int32)
    boundaries = np.zeros((shape[0], 1, 2), np.int32)
    return Batch(
        zeros,
        zeros,
        np.asarray(chain_ids, np.int32),
        np.asarray(loss_weights, np.float32),
        boundaries,
        boundaries.astype(bool),
    )


# One row: a prompt token, two completion tokens, padding.
ROW = batch([[0, 1, 1, 0]], [[1, 1, 1, 0]])


def outputs(student, teacher, rows):
    """Outputs with the states given as those of layers 1, 2, .. at every token."""
    none = jnp.zeros(())
    of_student, of_teacher = (dict(enumerate(states, start=1)) for states in (student, teacher))
    return Outputs(StudentOutputs(none, none, {}, of_student), TeacherOutputs(None, None, {}, of_teacher), rows)


def intermediate(student, teacher, rows, regressors, whole=None):
    """The term of pairs of layers 1:1, 2:2, .. over the denominator of a batch, by default these rows; its metric."""
    term = Intermediate(1.0, tuple((i, i) for i in range(1, len(student) + 1)))
    total, metrics = term.sums(outputs(student, teacher, rows), {"regressors": regressors}, {})
    return safe_divide(total, term.denominator(rows if whole is None else whole)), metrics["distill/intermediate"]


def token_alignment(student, teacher, rows, f, whole=None):
    term = TokenAlignment(1.0, ((1, 1),))
    total, metrics = term.sums(outputs([student], [teacher], rows), {"f": f}, {})
    return safe_divide(total, term.denominator(rows if whole is None else whole)), metrics["distill/token_alignment"]


def test_counts_leave_out_padding_and_for_completions_the_prompt():
    terms = TokenAlignment(1.0, ((1, 1),)), Intermediate(1.0, ((1, 1),))
    assert [term.denominator(ROW) for term in terms] == [2.0, 3.0]


def test_hint_loss_is_the_squared_error_over_the_targets_square():
    student = jnp.array([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [np.nan, np.nan]]])
    teacher = jnp.array([[[0.0, 0.0, 0.0], [0.0, 0.0, 2.0], [3.0, 0.0, 4.0], [np.nan, 0.0, 0.0]]])
    regressor = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    losses = hint_losses(student, teacher, jnp.array([[True, True, True, False]]), regressor)
    # (0, 0, 1) against (0, 0, 2): 1 / 4. (1, 0, 1) against (3, 0, 4): (4 + 9) / 25. The zero target is left out.
    np.testing.assert_allclose(losses, [[0.0, 0.25, 0.52, 0.0]], rtol=1e-6)


def test_intermediate_is_the_mean_over_pairs_and_all_tokens_of_chains():
    teacher = [jnp.full((1, 4, 1), 2.0), jnp.full((1, 4, 1), 4.0)]
    student = [jnp.full((1, 4, 1), 1.0), jnp.full((1, 4, 1), 1.0)]
    regressors = jnp.array([[[1.0]], [[2.0]]])  # 1 against 2: 1/4; 2 against 4: 1/4
    term, metric = intermediate(student, teacher, ROW, regressors.at[1].set(1.0))
    np.testing.assert_allclose(term, (0.25 + 9 / 16) / 2, rtol=1e-6)
    np.testing.assert_allclose(metric.value(), term, rtol=1e-6)
    assert metric.count == 3
    grads = jax.grad(lambda r: intermediate(student, teacher, ROW, r)[0])(regressors)
    # d/dr (r - t)^2 / t^2 / 2 pairs = (r - t) / t^2
    np.testing.assert_allclose(grads.ravel(), [(1 - 2) / 4, (2 - 4) / 16], rtol=1e-6)


def test_without_the_prompt_only_tokens_of_completions_are_matched():
    teacher, student = jnp.full((1, 4, 1), 2.0), jnp.array([[[9.0], [1.0], [2.0], [9.0]]])  # prompt, two, padding
    term = Intermediate(1.0, ((1, 1),), prompt=False)
    total, metrics = term.sums(outputs([student], [teacher], ROW), {"regressors": jnp.ones((1, 1, 1))}, {})
    assert term.denominator(ROW) == 2
    np.testing.assert_allclose(total, 1 / 4, rtol=1e-6)  # 1 against 2
    np.testing.assert_allclose(metrics["distill/intermediate"].value(), 1 / 8, rtol=1e-6)


def test_token_alignment_is_the_cosine_distance_at_completion_tokens():
    student = jnp.array([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    teacher = jnp.array([[[-1.0, 0.0], [0.0, 1.0], [3.0, 4.0], [-1.0, 0.0]]])
    term, metric = token_alignment(student, teacher, ROW, jnp.eye(2))
    np.testing.assert_allclose(term, (1.0 + 0.4) / 2, rtol=1e-6)
    np.testing.assert_allclose(metric.value(), term, rtol=1e-6)


@pytest.mark.parametrize("split", [1, 2])
def test_sums_over_parts_of_a_batch_give_the_batch(split):
    rng = np.random.default_rng(0)
    whole = batch((rng.random((4, 5)) < 0.5).astype(np.float32), rng.integers(0, 3, (4, 5)))
    student, teacher = (jnp.asarray(rng.normal(size=(4, 5, width)), jnp.float32) for width in (3, 2))
    maps = jnp.asarray(rng.normal(size=(1, 3, 2)), jnp.float32)
    parts = [jax.tree.map(lambda x, i=i: x[i :: split + 1], (student, teacher, whole)) for i in range(split + 1)]
    for of in (
        lambda s, t, b: intermediate([s], [t], b, maps, whole)[0],
        lambda s, t, b: token_alignment(s, t, b, maps[0], whole)[0],
    ):
        np.testing.assert_allclose(sum(of(*part) for part in parts), of(student, teacher, whole), rtol=1e-5)


def test_no_gradient_reaches_the_teacher():
    teacher = jnp.ones((1, 4, 2))
    grads = jax.grad(lambda t: intermediate([teacher], [t], ROW, 2 * jnp.eye(2)[None])[0])(teacher)
    np.testing.assert_array_equal(grads, 0.0)
