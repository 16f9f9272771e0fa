"""The divergences beside the forward KL equal their definitions in float64, in value and gradient, on every path."""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_losses_top_k import NAMES, ROWS, VOCAB, cached, inputs, one_token

from rtd_jax.base.sharding import ROW_AXES, MeshSettings, make_mesh
from rtd_jax.base.types import TopK
from rtd_jax.losses import Divergence, kd, kd_sums, kd_token_losses, top_k_kd_sums

ALL = get_args(Divergence)
OTHERS = ALL[1:]  # the forward KL has its own tests
LEAST = 1e-37  # probability of a token that the teacher rules out
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def log_softmax(logits):
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def exact(log_p, log_q, divergence, beta):
    """The definition, in float64, over the last axis."""
    p, q = np.exp(log_p), np.exp(log_q)

    def kl(log_x, log_y):
        return np.sum(np.exp(log_x) * (log_x - log_y), axis=-1)

    def mixed(share):
        return np.log(share * p + (1.0 - share) * q)

    if divergence == "forward_kl" or (divergence == "jsd" and beta == 0.0):
        return kl(log_p, log_q)
    if divergence == "reverse_kl" or (divergence == "jsd" and beta == 1.0):
        return kl(log_q, log_p)
    if divergence == "skewed_kl":
        return kl(log_p, mixed(beta))
    if divergence == "skewed_reverse_kl":
        return kl(log_q, mixed(1.0 - beta))
    return beta * kl(log_p, mixed(beta)) + (1.0 - beta) * kl(log_q, mixed(beta))


def on_tokens(student, teacher, temperature, divergence, beta):
    """T^2 times the divergence of logits [..., V]."""
    student, teacher = (log_softmax(np.asarray(z, np.float64) / temperature) for z in (student, teacher))
    return temperature**2 * exact(teacher, student, divergence, beta)


def slopes(function, logits, step=1e-5):
    """Gradient of the sum of a function's values by its logits, by central differences in float64."""
    logits = np.asarray(logits, np.float64)
    units = step * np.eye(logits.shape[-1])
    return np.stack([(function(logits + unit) - function(logits - unit)) / (2 * step) for unit in units], axis=-1)


def buckets(logits, top, temperature):
    """Log-probabilities [..., k + 1] of the student over the k tokens and the bucket; of the teacher, too."""
    log_q = log_softmax(logits / temperature)
    ids = np.asarray(top.ids_BLM)
    is_kept = np.any(ids[..., None] == np.arange(logits.shape[-1]), axis=-2)
    rest = np.logaddexp.reduce(np.where(is_kept, -np.inf, log_q), axis=-1)
    tail = np.asarray(top.soft_tail_BL, np.float64)[..., None]
    log_p = log_softmax(np.asarray(top.log_probs_BLM, np.float64) / temperature) + np.log1p(-tail)
    log_q = np.concatenate([np.take_along_axis(log_q, ids, axis=-1), rest[..., None]], axis=-1)
    return np.concatenate([log_p, np.log(tail)], axis=-1), log_q


def student_logits(given):
    return np.asarray(given["student_hidden_BLS"], np.float64) @ np.asarray(given["student_head_SV"], np.float64)


def teacher_logits(given):
    return np.asarray(given["teacher_hidden_BLD"], np.float64) @ np.asarray(given["teacher_head_DV"], np.float64)


def by_hidden_and_head(given, d_logits):
    """The gradients that a gradient by the logits gives."""
    d_logits = d_logits * np.asarray(given["weights_BL"], np.float64)[..., None]
    hidden, head = (np.asarray(given[name], np.float64) for name in NAMES)
    return d_logits @ head.T, np.einsum("bls,blv->sv", hidden, d_logits)


@functools.cache
def program(function, divergence, size, mesh=None):
    """Compiled: (inputs, beta, temperature, alpha) -> the sums, and the gradients of states and head."""

    def loss(states, head, given, beta, temperature, alpha):
        given = given | dict(zip(NAMES, (states, head), strict=True))
        traced = {"temperature": temperature, "alpha": alpha, "beta": beta}
        sums = function(**given, **traced, divergence=divergence, vocab_size=size, chunk_length=3, mesh=mesh)
        return sums.loss, sums

    differentiated = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(lambda given, *numbers: differentiated(*(given[name] for name in NAMES), given, *numbers))


def evaluated(function, given, divergence, beta=0.3, temperature=4.0, alpha=1.0, size=VOCAB, mesh=None):
    """The sums, and the gradients of states and head."""
    (_, sums), got = program(function, divergence, size, mesh)(given, beta, temperature, alpha)
    return sums, got


def assert_near(got, want, tolerance):
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * np.abs(other).max() + 1e-8)


@pytest.mark.parametrize(
    ("divergence", "beta", "by_hand"),
    [
        ("forward_kl", 0.5, np.log(2) / 2 + np.log(2 / 3) / 2),
        ("reverse_kl", 0.5, np.log(1 / 2) / 4 + 3 * np.log(3 / 2) / 4),
        # m = (3/8, 5/8); and (5/16, 11/16), of which p has a quarter; and (7/16, 9/16), of which q has one.
        ("jsd", 0.5, (np.log(4 / 3) + np.log(4 / 5)) / 4 + (np.log(2 / 3) + 3 * np.log(6 / 5)) / 8),
        ("jsd", 0.25, (np.log(8 / 5) + np.log(8 / 11)) / 8 + 3 * (np.log(4 / 5) + 3 * np.log(12 / 11)) / 16),
        ("skewed_kl", 0.25, np.log(8 / 5) / 2 + np.log(8 / 11) / 2),
        ("skewed_reverse_kl", 0.25, np.log(4 / 7) / 4 + 3 * np.log(4 / 3) / 4),
    ],
)
def test_by_hand(divergence, beta, by_hand):
    """Teacher p = (1/2, 1/2), student q = (1/4, 3/4); KL at temperature 1 is the forward one, whatever is trained."""
    teacher, student = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    soft, _, kl_T1, _ = kd_token_losses(student, teacher, jnp.array(1), 1.0, 2, divergence, beta)
    np.testing.assert_allclose(soft, by_hand, rtol=1e-6)
    np.testing.assert_allclose(kl_T1, np.log(2) / 2 + np.log(2 / 3) / 2, rtol=1e-6)
    # Square roots of the student's probabilities at T = 2 are squared again; times T^2 = 4.
    squares = 2 * student
    soft, _, _, _ = kd_token_losses(squares, teacher, jnp.array(1), 2.0, 2, divergence, beta)
    np.testing.assert_allclose(soft, 4 * by_hand, rtol=1e-6)
    # Of (1/2, 1/4, 1/4) and (1/4, 3/8, 3/8) the first token and the bucket are these two.
    sums = one_token(jnp.log(jnp.array([0.25, 0.375, 0.375])), ([0], [0.5], 0.5, 0.5), **_named(divergence, beta))
    np.testing.assert_allclose(sums.soft, by_hand, rtol=1e-6)


def _named(divergence, beta):
    return {"divergence": divergence, "beta": beta}


@pytest.mark.parametrize("divergence", OTHERS)
def test_value_and_gradient_are_those_of_the_definition(divergence):
    given = inputs()
    for beta in BETAS:
        for temperature in (1.0, 4.0):

            def loss(z, temperature=temperature, beta=beta):
                return on_tokens(z, teacher_logits(given), temperature, divergence, beta)

            sums, got = evaluated(kd_sums, given, divergence, beta, temperature)
            want = np.sum(np.asarray(given["weights_BL"]) * loss(student_logits(given)))
            np.testing.assert_allclose([sums.loss, sums.soft], want, rtol=2e-5, atol=1e-12)
            assert_near(got, by_hidden_and_head(given, slopes(loss, student_logits(given))), 1e-4)
    assert program(kd_sums, divergence, VOCAB, None)._cache_size() == 1  # neither number compiles anew


@pytest.mark.parametrize("divergence", OTHERS)
def test_autodiff_through_losses_of_whole_logits_gives_the_same_gradient(divergence):
    student, teacher = (3 * jax.random.normal(jax.random.key(seed), (5, 9)) for seed in (0, 1))

    @jax.jit
    @jax.grad
    def got(z, beta):
        return jnp.sum(kd_token_losses(z, teacher, jnp.zeros(5, jnp.int32), 2.0, 8, divergence, beta)[0])

    for beta in BETAS:
        want = slopes(lambda z, beta=beta: on_tokens(z, teacher[:, :8], 2.0, divergence, beta), student[:, :8])
        assert_near([got(student, beta)[:, :8]], [want], 1e-4)
        np.testing.assert_array_equal(got(student, beta)[:, 8:], 0.0)


@pytest.mark.parametrize("divergence", OTHERS)
def test_models_that_nearly_agree_keep_their_digits(divergence):
    """Logits that differ by 1e-3: divergences of 1e-7, formed from float32 numbers of order 1."""
    size = 512
    teacher = 3 * jax.random.normal(jax.random.key(0), (1, 4, size))
    student = teacher + 1e-3 * jax.random.normal(jax.random.key(1), teacher.shape)
    head, labels, weights = jnp.eye(size), jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4))
    # Heads that are the identity: the gradient of the states is that of the logits.
    given = dict(zip(NAMES, (student, head), strict=True)) | {"labels_BL": labels, "weights_BL": weights}
    given |= {"teacher_hidden_BLD": teacher, "teacher_head_DV": head}
    for beta in (0.0, 0.1, 0.5, 1.0):
        sums, (got, _) = evaluated(kd_sums, given, divergence, beta, 2.0, size=size)
        want = np.sum(on_tokens(student, teacher, 2.0, divergence, beta))
        np.testing.assert_allclose(sums.soft, want, rtol=5e-3, atol=1e-12)
        assert float(sums.soft) >= 0.0
        want = slopes(lambda z, b=beta: on_tokens(z, teacher, 2.0, divergence, b), student, step=1e-4)
        assert np.abs(got - want).max() <= 1e-3 * np.abs(want).max() + 1e-9


@pytest.mark.parametrize("divergence", OTHERS)
def test_equal_models_have_no_divergence_and_no_gradient(divergence):
    given = inputs()
    same = {
        **given,
        "teacher_hidden_BLD": given["student_hidden_BLS"],
        "teacher_head_DV": given["student_head_SV"],
    }
    for beta in BETAS:
        sums, got = evaluated(kd_sums, same, divergence, beta)
        for array in (sums.loss, *got):
            np.testing.assert_array_equal(array, 0.0)
        sums, got = evaluated(top_k_kd_sums, cached(same, 4), divergence, beta)
        assert 0.0 <= float(sums.loss) < 1e-10
        assert all(np.abs(gradient).max() < 1e-5 for gradient in got)


def test_at_the_ends_of_beta_they_are_the_plain_ones():
    """JSD at 0 and 1 by convention, near them in the limit; what is skewed by 0 is not skewed, and by 1 it is 0."""
    given = inputs()

    def of(divergence, beta=0.5):
        sums, got = evaluated(kd_sums, given, divergence, beta)
        return sums.loss, *got

    def assert_equal(one, other, tolerance=1e-5, scale=1.0):
        assert_near([scale * x for x in one], other, tolerance)

    forward, reverse = of("forward_kl"), of("reverse_kl")
    assert_equal(of("jsd", 0.0), forward)
    assert_equal(of("jsd", 1.0), reverse)
    assert_equal(of("jsd", 1e-4), forward, 2e-3, 1e4)
    assert_equal(of("jsd", 1 - 2.0**-13), reverse, 2e-3, 2.0**13)
    assert_equal(of("skewed_kl", 0.0), forward)
    assert_equal(of("skewed_reverse_kl", 0.0), reverse)
    for divergence in ("skewed_kl", "skewed_reverse_kl"):
        for array in of(divergence, 1.0):
            np.testing.assert_array_equal(array, 0.0)


@pytest.mark.parametrize("divergence", OTHERS)
def test_with_every_token_kept_it_is_the_online_loss(divergence):
    given = inputs()
    kept = cached(given, VOCAB)
    for beta in BETAS:
        sums, got = evaluated(top_k_kd_sums, kept, divergence, beta, alpha=0.7)
        expected, wanted = evaluated(kd_sums, given, divergence, beta, alpha=0.7)
        assert_near((*sums, *got), (*expected, *wanted), 2e-5)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("divergence", OTHERS)
def test_value_and_gradient_are_those_of_the_buckets(divergence, k):
    given = inputs()
    kept = cached(given, k)
    for beta in (0.0, 0.3, 1.0):

        def loss(z, beta=beta):
            return 16 * exact(*buckets(z, kept["top"], 4.0), divergence, beta)

        sums, got = evaluated(top_k_kd_sums, kept, divergence, beta)
        want = np.sum(np.asarray(given["weights_BL"]) * loss(student_logits(given)))
        np.testing.assert_allclose(sums.soft, want, rtol=1e-4, atol=1e-9)
        assert_near(got, by_hidden_and_head(given, slopes(loss, student_logits(given))), 2e-4)


@pytest.mark.parametrize("divergence", OTHERS)
def test_more_buckets_tell_more_and_never_more_than_all_tokens(divergence):
    given = inputs()
    whole, _ = evaluated(kd_sums, given, divergence)
    np.testing.assert_allclose(whole.kl_T1, evaluated(kd_sums, given, "forward_kl")[0].kl_T1, rtol=1e-6)
    last = 0.0
    for k in (1, 4):
        sums, _ = evaluated(top_k_kd_sums, cached(given, k), divergence)
        assert last < float(sums.soft) <= float(whole.soft) * (1 + 1e-5)
        last = float(sums.soft)
    plain, _ = evaluated(top_k_kd_sums, cached(given, 4), "forward_kl")
    np.testing.assert_allclose(sums.kl_T1, plain.kl_T1, rtol=1e-6)


@functools.cache
def one_token_functions(divergence, size):
    """Of one token's logits, teacher's logits and beta: value, gradient by autodiff, gradient in closed form."""
    labels, weights, eye = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1)), jnp.eye(size)

    def loss(z, teacher, beta):
        return kd_token_losses(z, teacher, jnp.array(0), 1.0, size, divergence, beta)[0]

    def fused(z, teacher, beta):
        # Heads that are the identity; 0 * -inf would be NaN in their product.
        models = z[None, None], eye, jnp.maximum(teacher, -3e38)[None, None], eye
        named = {"temperature": 1.0, "alpha": 1.0, "vocab_size": size, "divergence": divergence, "beta": beta}
        return kd_sums(*models, labels, weights, **named).loss

    return jax.jit(lambda *x: (*jax.value_and_grad(loss)(*x), jax.grad(fused)(*x)))


def of_one_token(student, teacher, divergence, beta):
    logits = jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32)
    return one_token_functions(divergence, len(student))(*logits, beta)


@pytest.mark.parametrize("divergence", OTHERS)
@pytest.mark.parametrize("beta", BETAS)
def test_logits_far_apart_give_finite_losses_and_bounded_gradients(divergence, beta):
    """Differences of 1e4 and 1e30, a teacher that is certain, one that rules tokens out, and equal models of these."""
    rows = [[0.0, 0.0, 0.0], [1e4, 0.0, -1e4], [-1e4, 1e4, 0.0], [1e30, 0.0, -1e30], [0.0, 50.0, -90.0]]
    ruled_out = [[0.0, -np.inf, -np.inf], [-np.inf, 1.0, 0.0]]
    bounded = divergence != "reverse_kl" and 0.0 < beta < 1.0
    # m is at least beta, or 1 - beta, of what it is compared with: a share of 0.1 allows -log 0.1.
    most = 2.4 if bounded else 86.0
    for student in rows:
        for teacher in rows + ruled_out:
            value, by_autodiff, closed = of_one_token(student, teacher, divergence, beta)
            assert np.isfinite(value)
            assert np.all(np.isfinite(by_autodiff))
            assert np.abs(closed).max() <= most, (student, teacher)
            if max(np.abs(student)) < 1e30:  # such logits are cut, which stops autodiff
                np.testing.assert_allclose(closed, by_autodiff, rtol=1e-3, atol=1e-5)
            if bounded or divergence == "reverse_kl":
                assert 0.0 <= float(value) <= most
            if student == teacher:
                assert float(value) == 0.0
                np.testing.assert_array_equal(closed, 0.0)


def test_a_token_that_the_teacher_rules_out_has_the_least_probability_online_and_from_a_cache():
    """Where KL(q || p) is infinite: p = (1, 0) counts as (1, 1e-37), with the gradient of that."""
    student = np.log([0.5, 0.25, 0.25])
    log_p = np.log([1.0, LEAST, LEAST])
    for divergence, beta in (("reverse_kl", 0.5), ("jsd", 1.0), ("skewed_reverse_kl", 0.0)):
        value, by_autodiff, closed = of_one_token(student, [0.0, -np.inf, -np.inf], divergence, beta)
        np.testing.assert_allclose(value, exact(log_p, student, "reverse_kl", 0.0), rtol=1e-5)
        want = slopes(lambda z: exact(log_p, log_softmax(z), "reverse_kl", 0.0), student)
        assert_near([by_autodiff, closed], [want, want], 1e-5)
        # From a cache: ruled out by name, where the bucket is empty; or the bucket itself.
        named = one_token(student, ([0, 1, 2], [1.0, 0.0, 0.0], 0.0, 0.0), **_named(divergence, beta))
        np.testing.assert_allclose(named.soft, value, rtol=1e-5)
        halves = np.log([0.5, 0.5])
        bucket = one_token(student, ([0], [1.0], 0.0, 0.0), **_named(divergence, beta))
        np.testing.assert_allclose(bucket.soft, exact(log_p[:2], halves, "reverse_kl", 0.0), rtol=1e-5)


@pytest.mark.parametrize("divergence", OTHERS)
def test_cached_predictions_at_the_edges_give_finite_losses_and_gradients(divergence):
    """A teacher that is certain, a bucket that underflowed, a student without mass at the k tokens or in the bucket."""
    students = jnp.array([[0.0, 0.0, 0.0], [1e4, 0.0, -1e4], [-1e4, 1e4, 0.0], [1e30, -1e30, 0.0]])
    ids, labels, weights = jnp.tile(jnp.arange(2), (1, 4, 1)), jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def differentiated(z, top, beta):
        sums = top_k_kd_sums(
            *(z, jnp.eye(3), top, labels, weights),
            **{"temperature": 2.0, "alpha": 1.0, "vocab_size": 3},
            **_named(divergence, beta),
        )
        return sums.loss, sums

    for log_probs in ([0.0, -jnp.inf], [-0.7, -0.7], [0.0, -1e4]):
        for tail in (0.0, 1e-38, 0.5, 1 - 1e-7):
            full = jnp.full((1, 4), tail)
            top = TopK(ids, jnp.tile(jnp.array(log_probs), (1, 4, 1)), full, full)
            for beta in BETAS:
                (_, sums), gradient = differentiated(students[None], top, beta)
                assert all(np.isfinite(x) and x >= 0.0 for x in sums)
                assert np.all(np.isfinite(gradient))
                # The forward KL's gradient is at most T, the reverse KL's at most T times 85.
                assert np.abs(gradient).max() <= 2 * 86.0


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_vocabularies_may_be_padded_differently_and_masked_tokens_hold_anything(divergence):
    given = inputs()
    keep = (given["weights_BL"] > 0)[..., None]
    wide = {
        **given,
        "student_head_SV": jnp.pad(given["student_head_SV"], ((0, 0), (0, 3)), constant_values=50.0),
        "teacher_head_DV": jnp.pad(given["teacher_head_DV"], ((0, 0), (0, 6)), constant_values=-50.0),
        "student_hidden_BLS": jnp.where(keep, given["student_hidden_BLS"], jnp.nan),
        "teacher_hidden_BLD": jnp.where(keep, given["teacher_hidden_BLD"], jnp.inf),
    }
    sums, (d_hidden, d_head) = evaluated(kd_sums, wide, divergence, alpha=0.7)
    expected, wanted = evaluated(kd_sums, given, divergence, alpha=0.7)
    np.testing.assert_allclose(sums, expected, rtol=1e-6)
    assert_near((d_hidden, d_head[:, :VOCAB]), wanted, 1e-5)
    np.testing.assert_array_equal(d_head[:, VOCAB:], 0.0)
    np.testing.assert_array_equal(np.asarray(d_hidden)[~np.asarray(keep[..., 0])], 0.0)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_the_sums_of_micro_batches_add_up_to_those_of_the_batch(divergence):
    given = inputs()
    halves = [
        {name: x if name.endswith(("SV", "DV")) else x[rows] for name, x in given.items()}
        for rows in (slice(0, ROWS // 2), slice(ROWS // 2, ROWS))
    ]
    whole, (_, whole_head) = evaluated(kd_sums, given, divergence, alpha=0.7)
    parts = [evaluated(kd_sums, half, divergence, alpha=0.7) for half in halves]
    together = (sum(sums.loss for sums, _ in parts), sum(head for _, (_, head) in parts))
    assert_near(together, (whole.loss, whole_head), 1e-5)
    mean = kd(**given, temperature=4.0, alpha=0.7, vocab_size=VOCAB, **_named(divergence, 0.3))
    np.testing.assert_allclose(mean, whole.loss / whole.weight, rtol=1e-6)


@pytest.mark.parametrize(("divergence", "sizes"), [("reverse_kl", (1, 2, 4)), ("jsd", (1, 1, 8)), ("jsd", (2, 2, 2))])
@pytest.mark.parametrize("function", [kd_sums, top_k_kd_sums])
def test_any_mesh_gives_the_same_value_and_gradient(function, divergence, sizes):
    """Also where the vocabulary's axis does not divide it (20 over 8): it then lies whole."""
    given = inputs() if function is kd_sums else cached(inputs(), 4)
    mesh = make_mesh(MeshSettings(*sizes), jax.devices()[: int(np.prod(sizes))])
    rows = NamedSharding(mesh, PartitionSpec(ROW_AXES))
    placed = {name: x if name.endswith(("SV", "DV")) else jax.device_put(x, rows) for name, x in given.items()}
    sums, got = evaluated(function, placed, divergence, alpha=0.7, mesh=mesh)
    expected, wanted = evaluated(function, given, divergence, alpha=0.7)
    assert_near((*sums, *got), (*expected, *wanted), 2e-5)
