"""The KD loss from cached predictions: the divergence over k + 1 buckets, and at k = V that over all tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rtd_jax.base.sharding import ROW_AXES, MeshSettings, make_mesh
from rtd_jax.base.types import TopK
from rtd_jax.losses import kd_sums, top_k_kd_sums
from rtd_jax.teacher.predictions import top_k_predictions

ROWS, LENGTH, STUDENT_WIDTH, TEACHER_WIDTH, VOCAB = 4, 7, 8, 12, 20
NAMES = ("student_hidden_BLS", "student_head_SV")


def inputs(dtype=jnp.float32, padding=0):
    keys = jax.random.split(jax.random.key(0), 6)
    wide = VOCAB + padding
    return {
        "student_hidden_BLS": jax.random.normal(keys[0], (ROWS, LENGTH, STUDENT_WIDTH)).astype(dtype),
        "student_head_SV": jax.random.normal(keys[1], (STUDENT_WIDTH, wide)).astype(dtype),
        "teacher_hidden_BLD": jax.random.normal(keys[2], (ROWS, LENGTH, TEACHER_WIDTH)).astype(dtype),
        "teacher_head_DV": jax.random.normal(keys[3], (TEACHER_WIDTH, wide)).astype(dtype),
        "labels_BL": jax.random.randint(keys[4], (ROWS, LENGTH), 0, VOCAB),
        "weights_BL": (jax.random.uniform(keys[5], (ROWS, LENGTH)) > 0.4).astype(jnp.float32),
    }


def cached(given, k, temperature=4.0, **changes):
    """The arguments of `top_k_kd_sums` for the teacher of `given`."""
    states = given["teacher_hidden_BLD"], given["teacher_head_DV"]
    top = top_k_predictions(*states, k=k, temperature=temperature, vocab_size=VOCAB, chunk_length=3)
    kept = {name: value for name, value in given.items() if not name.startswith("teacher")}
    return kept | {"top": top} | changes


def options(temperature=4.0, alpha=0.7):
    return {"temperature": temperature, "alpha": alpha, "vocab_size": VOCAB, "chunk_length": 3}


def gradients(function, given, **settings):
    def loss(*args):
        return function(**(given | dict(zip(NAMES, args, strict=True))), **settings).loss

    return jax.value_and_grad(loss, argnums=(0, 1))(*(given[name] for name in NAMES))


def one_token(logits, top, label=0, temperature=1.0, **divergence):
    """The sums of one token with the student's logits as given."""
    given = jnp.asarray(logits, jnp.float32)[None, None]
    ids, probs, tail, soft_tail = top
    top = TopK(jnp.array([[ids]]), jnp.log(jnp.array([[probs]])), jnp.full((1, 1), tail), jnp.full((1, 1), soft_tail))
    head = jnp.eye(given.shape[-1])
    where = jnp.full((1, 1), label), jnp.ones((1, 1))
    named = {"temperature": temperature, "alpha": 1.0, "vocab_size": given.shape[-1], **divergence}
    return top_k_kd_sums(given, head, top, *where, **named)


def test_by_hand():
    # Teacher (1/2, 1/4, 1/8, 1/8), the first two kept; student 1/4 each. Buckets: p (1/2, 1/4, 1/4), q (1/4, 1/4, 1/2).
    sums = one_token(np.zeros(4), ([0, 1], [0.5, 0.25], 0.25, 0.25))
    by_hand = 0.5 * np.log(2) + 0.25 * np.log(1) + 0.25 * np.log(0.5)
    np.testing.assert_allclose(sums.kl_T1, by_hand, rtol=1e-6)
    np.testing.assert_allclose(sums.soft, by_hand, rtol=1e-6)
    np.testing.assert_allclose(sums.hard, np.log(4), rtol=1e-6)
    # At T = 2 probabilities are square roots, renormalised over all four tokens; the student's stay 1/4. Times T^2 = 4.
    roots = np.sqrt([0.5, 0.25, 0.125, 0.125])
    p = roots / roots.sum()
    tail = p[2] + p[3]
    sums = one_token(np.zeros(4), ([0, 1], [0.5, 0.25], 0.25, tail), temperature=2.0)
    expected = p[0] * np.log(4 * p[0]) + p[1] * np.log(4 * p[1]) + tail * np.log(2 * tail)
    np.testing.assert_allclose(sums.soft, 4 * expected, rtol=1e-5)
    np.testing.assert_allclose(sums.kl_T1, by_hand, rtol=1e-6)  # the comparable number does not depend on T


def test_a_constant_in_the_log_probabilities_changes_nothing():
    """Rounded ones no longer sum to 1 with the bucket; the bucket's mass is kept, the k tokens share what it leaves."""
    sums = [one_token(np.zeros(4), ([0, 1], np.array([0.5, 0.25]) * c, 0.25, 0.25)).soft for c in (1.0, 0.9, 1.2)]
    np.testing.assert_allclose(sums, sums[0], rtol=1e-5)


def test_predictions_are_the_most_probable_tokens_and_the_mass_beyond_them():
    given = inputs(padding=3)
    logits = np.asarray(given["teacher_hidden_BLD"] @ given["teacher_head_DV"], np.float64)[..., :VOCAB]
    top = cached(given, 5)["top"]
    for T, tail in ((1.0, top.tail_BL), (4.0, top.soft_tail_BL)):
        p = np.exp(logits / T) / np.exp(logits / T).sum(-1, keepdims=True)
        np.testing.assert_allclose(tail, np.sort(p)[..., :-5].sum(-1), rtol=1e-4)
    np.testing.assert_array_equal(top.ids_BLM, np.argsort(-logits)[..., :5])
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(top.log_probs_BLM, np.log(-np.sort(-p))[..., :5], rtol=1e-4, atol=1e-5)


def test_tokens_as_probable_as_the_last_one_kept_count_once():
    top = top_k_predictions(jnp.ones((1, 1, 1)), jnp.zeros((1, 8)), k=3, temperature=4.0, vocab_size=6)
    np.testing.assert_allclose([top.tail_BL, top.soft_tail_BL], 0.5, rtol=1e-6)
    whole = top_k_predictions(jnp.ones((1, 1, 1)), jnp.zeros((1, 8)), k=6, temperature=4.0, vocab_size=6)
    np.testing.assert_array_equal([whole.tail_BL, whole.soft_tail_BL], 0.0)


@pytest.mark.parametrize("k", [0, 21])
def test_a_k_that_cannot_be_is_refused(k):
    with pytest.raises(ValueError, match=f"k is {k}; it must be at least 1 and at most the vocabulary's 20 tokens"):
        cached(inputs(), k)


@pytest.mark.parametrize(("temperature", "alpha", "padding"), [(4.0, 0.7, 0), (1.0, 1.0, 0), (4.0, 0.7, 4)])
def test_with_every_token_kept_it_is_the_online_loss(temperature, alpha, padding):
    given = inputs(padding=padding)
    settings = options(temperature, alpha)
    value, got = gradients(top_k_kd_sums, cached(given, VOCAB, temperature), **settings)
    expected, wanted = gradients(kd_sums, given, **settings)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for gradient, want in zip(got, wanted, strict=True):
        np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    sums, want = (f(**g, **settings) for f, g in ((top_k_kd_sums, cached(given, VOCAB, temperature)), (kd_sums, given)))
    np.testing.assert_allclose(sums, want, rtol=1e-5)


def _bucket_loss(hidden, head, given, top, temperature):
    """alpha = 1, by definition, differentiated by JAX."""
    logits = (hidden @ head)[..., :VOCAB]
    log_q = jax.nn.log_softmax(logits / temperature)
    is_kept = jnp.any(top.ids_BLM[..., None] == jnp.arange(VOCAB), axis=-2)
    log_rest = jax.nn.logsumexp(jnp.where(is_kept, -jnp.inf, log_q), axis=-1)
    teacher = (given["teacher_hidden_BLD"] @ given["teacher_head_DV"])[..., :VOCAB]
    p = jax.nn.softmax(teacher / temperature)
    rest = jnp.sum(jnp.where(is_kept, 0.0, p), axis=-1)
    kl = jnp.sum(jnp.where(is_kept, p * (jnp.log(p) - log_q), 0.0), axis=-1) + rest * (jnp.log(rest) - log_rest)
    return temperature**2 * jnp.sum(given["weights_BL"] * kl)


@pytest.mark.parametrize("k", [1, 4, 19])
def test_value_and_gradient_are_those_of_the_buckets(k):
    given = inputs()
    kept = cached(given, k)
    value, got = gradients(top_k_kd_sums, kept, **options(alpha=1.0))
    args = tuple(given[name] for name in NAMES)
    expected, wanted = jax.value_and_grad(_bucket_loss, argnums=(0, 1))(*args, given, kept["top"], 4.0)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    for gradient, want in zip(got, wanted, strict=True):
        np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_never_negative_never_more_than_over_all_tokens_and_zero_for_equal_models():
    given = inputs()
    whole = kd_sums(**given, **options())
    last = 0.0
    for k in (1, 2, 8, 19):
        sums = top_k_kd_sums(**cached(given, k), **options())
        assert last <= float(sums.soft) <= float(whole.soft) * (1 + 1e-5)  # more buckets tell more
        assert 0 < float(sums.kl_T1) <= float(whole.kl_T1) * (1 + 1e-5)
        np.testing.assert_allclose(sums.hard, whole.hard, rtol=1e-6)
        last = float(sums.soft)
    same = {
        **given,
        "teacher_hidden_BLD": given["student_hidden_BLS"],
        "teacher_head_DV": given["student_head_SV"],
    }
    settings = options(alpha=1.0)
    value, got = gradients(top_k_kd_sums, cached(same, 4), **settings)
    assert abs(float(value)) < 1e-4
    assert all(np.abs(gradient).max() < 1e-5 for gradient in got)


def test_masked_tokens_contribute_nothing_whatever_the_cache_holds_there():
    given = inputs()
    kept = cached(given, 4)
    keep = given["weights_BL"] > 0
    top = kept["top"]
    dirty = TopK(
        jnp.where(keep[..., None], top.ids_BLM, -7),
        *(jnp.where(keep.reshape(keep.shape + (1,) * (x.ndim - 2)), x, jnp.nan) for x in top[1:]),
    )
    hidden = jnp.where(keep[..., None], given["student_hidden_BLS"], jnp.nan)
    value, (d_hidden, d_head) = gradients(
        top_k_kd_sums, kept | {"top": dirty, "student_hidden_BLS": hidden}, **options()
    )
    expected, (want_hidden, want_head) = gradients(top_k_kd_sums, kept, **options())
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(d_head, want_head)
    np.testing.assert_array_equal(d_hidden, want_hidden)
    assert np.all(np.asarray(d_hidden)[~np.asarray(keep)] == 0)


def test_padded_vocabulary_gets_no_probability():
    given = inputs(padding=4)
    given["student_head_SV"] = given["student_head_SV"].at[:, VOCAB:].set(50.0)
    value, (_, d_head) = gradients(top_k_kd_sums, cached(given, 4), **options())
    cut = {**given, "student_head_SV": given["student_head_SV"][:, :VOCAB]}
    expected, _ = gradients(top_k_kd_sums, cached(given, 4) | {"student_head_SV": cut["student_head_SV"]}, **options())
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_array_equal(d_head[:, VOCAB:], 0.0)


def test_a_student_without_mass_in_the_bucket_gives_a_finite_loss_and_gradient():
    logits = np.array([0.0, 0.0, -1e4, -1e4], np.float32)
    given = jnp.asarray(logits)[None, None]
    top = TopK(
        jnp.array([[[0, 1]]]), jnp.log(jnp.array([[[0.5, 0.25]]])), jnp.full((1, 1), 0.25), jnp.full((1, 1), 0.25)
    )
    where = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1))
    loss, gradient = jax.value_and_grad(
        lambda x: top_k_kd_sums(x, jnp.eye(4), top, *where, temperature=1.0, alpha=1.0, vocab_size=4).loss
    )(given)
    assert np.isfinite(loss)
    assert np.all(np.isfinite(gradient))


def test_bfloat16_inputs_are_near_float32():
    given = inputs(jnp.bfloat16)
    exact = {name: value.astype(jnp.float32) if value.dtype == jnp.bfloat16 else value for name, value in given.items()}
    top = {"top": cached(exact, 4)["top"]}
    top["top"] = top["top"]._replace(log_probs_BLM=top["top"].log_probs_BLM.astype(jnp.bfloat16))
    value, got = gradients(top_k_kd_sums, cached(given, 4) | top, **options())
    expected, wanted = gradients(top_k_kd_sums, cached(exact, 4), **options())
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=2e-2)
    for gradient, want in zip(got, wanted, strict=True):
        assert gradient.dtype == jnp.bfloat16
        np.testing.assert_allclose(gradient.astype(jnp.float32), want, rtol=2e-2, atol=2e-2 * np.abs(want).max())


@pytest.mark.parametrize("sizes", [(1, 1, 2), (2, 2, 2), (1, 2, 4), (1, 1, 8)])
def test_any_mesh_gives_the_same_value_and_gradient(sizes):
    """Also where the vocabulary's axis does not divide it (20 over 8): it then lies whole."""
    given = cached(inputs(), 4)
    mesh = make_mesh(MeshSettings(*sizes), jax.devices()[: int(np.prod(sizes))])
    rows = NamedSharding(mesh, PartitionSpec(ROW_AXES))
    placed = {
        name: value if name == "student_head_SV" else jax.device_put(value, rows) for name, value in given.items()
    }
    of_mesh = jax.jit(lambda given: gradients(top_k_kd_sums, given, **options(), mesh=mesh))(placed)
    alone = gradients(top_k_kd_sums, given, **options())
    for got, want in zip(jax.tree.leaves(of_mesh), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
