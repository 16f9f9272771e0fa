"""Losses at the edges: arguments that make no sense, batches with nothing in them, numbers near the ends of float32."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtd_jax.base.means import within
from rtd_jax.base.types import Batch, TeacherOutputs, TopK
from rtd_jax.losses import (
    LossWeights,
    Projections,
    alignment,
    boundary_losses,
    coherence,
    cross_entropy_sums,
    denominators,
    kd,
    kd_sums,
    kd_token_losses,
    rtd,
    top_k_kd_sums,
    transition_losses,
)
from rtd_jax.losses.fused import map_logits
from rtd_jax.losses.hints import hint_losses
from rtd_jax.losses.policy import policy_sums, step_advantages, token_log_probs
from rtd_jax.teacher.predictions import top_k_predictions

WIDTH, VOCAB = 4, 6


def _states(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(np.float32(scale) * jax.random.normal(jax.random.key(seed), shape))


def _tokens(rows: int = 2, length: int = 3) -> dict:
    return {"labels_BL": jnp.zeros((rows, length), jnp.int32), "weights_BL": jnp.ones((rows, length))}


def _top(rows: int = 2, length: int = 3) -> TopK:
    ids = jnp.broadcast_to(jnp.arange(2), (rows, length, 2))
    log_probs, tail = jnp.full((rows, length, 2), -1.0), jnp.full((rows, length), 0.1)
    return TopK(ids, log_probs, tail, tail)


def _calls(rows: int = 2, length: int = 3, **changes):
    """Every loss with an LM head inside, of the states and the head, with `changes` where they are read."""

    def options(**values):
        return {key: changes.get(key, value) for key, value in values.items()}

    teacher = _states(2, rows, length, WIDTH), _states(3, WIDTH, VOCAB)
    policy = {"old_log_probs_BL": jnp.full((rows, length), -1.0), "advantages_BL": jnp.ones((rows, length))}
    size = {"vocab_size": VOCAB, "chunk_length": 2}
    soft = {"temperature": 2.0, "alpha": 0.5, "divergence": "jsd", "beta": 0.5}
    tokens = _tokens(rows, length)
    named = tokens["labels_BL"], tokens["weights_BL"]
    top = _top(rows, length)
    return {
        "kd": lambda h, w: kd(h, w, *teacher, *named, **options(**size, **soft)),
        "kd_sums": lambda h, w: kd_sums(h, w, *teacher, *named, **options(**size, **soft)).loss,
        "top_k_kd_sums": lambda h, w: top_k_kd_sums(h, w, top, *named, **options(**size, **soft)).loss,
        "cross_entropy_sums": lambda h, w: cross_entropy_sums(h, w, *named, **options(**size))[0],
        "policy_sums": lambda h, w: (
            policy_sums(h, w, *named, *policy.values(), **options(**size, temperature=2.0, clip=0.2)).loss
        ),
        "token_log_probs": lambda h, w: jnp.sum(token_log_probs(h, w, *named, **options(**size, temperature=2.0))),
        "map_logits": lambda h, w: jnp.sum(map_logits(lambda z: z, h, w, **options(**size))),
    }


NAMES = tuple(_calls())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": VOCAB + 1}, rf"vocab_size is {VOCAB + 1}, but \w+ has {VOCAB} columns"),
        ({"vocab_size": 0}, "vocab_size is 0; expected a number at least 1"),
        ({"vocab_size": -3}, "vocab_size is -3; expected a number at least 1"),
        ({"chunk_length": 0}, "chunk_length is 0; expected a number at least 1"),
        ({"chunk_length": -1}, "chunk_length is -1; expected a number at least 1"),
        *(({"temperature": x}, f"temperature is {x}; expected a number from 0.001") for x in (0, 0.0, -4.0, math.inf)),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": 1e-300}, "temperature is 1e-300"),
        *(({"alpha": x}, f"alpha is {x}; expected a number from 0 to 1") for x in (-0.1, 1.5, math.nan)),
        *(({"beta": x}, f"beta is {x}; expected a number from 0 to 1") for x in (-0.1, 1.5, math.nan)),
        ({"divergence": "kl"}, "divergence is 'kl'; use one of forward_kl, reverse_kl, jsd, skewed_kl, skewed_rev"),
        ({"clip": -0.1}, "clip is -0.1; expected a number at least 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_by_name(name, changes, message):
    argument = next(iter(changes))
    reads = {"temperature": NAMES[:3] + NAMES[4:6], "clip": ("policy_sums",)}
    reads |= dict.fromkeys(("alpha", "divergence", "beta"), NAMES[:3])
    if name not in reads.get(argument, NAMES):
        return
    with pytest.raises(ValueError, match=message):
        _calls(**changes)[name](_states(0, 2, 3, WIDTH), _states(1, WIDTH, VOCAB))


def test_arguments_of_losses_on_whole_logits_are_checked_too():
    logits, labels = _states(0, 2, VOCAB), jnp.zeros(2, jnp.int32)
    for temperature, size, message in (
        (0.0, VOCAB, "temperature is 0.0"),
        (1.0, VOCAB + 1, "but student_logits has 6 columns"),
        (1.0, 0, "vocab_size is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            kd_token_losses(logits, logits, labels, temperature, size)
    with pytest.raises(ValueError, match="divergence is 'jds'; use one of"):
        kd_token_losses(logits, logits, labels, 1.0, VOCAB, "jds")
    with pytest.raises(ValueError, match="but teacher_logits has 6 columns"):
        kd_token_losses(_states(0, 2, VOCAB + 2), logits, labels, 1.0, VOCAB + 1)
    with pytest.raises(ValueError, match="std_floor is 0"):
        step_advantages(jnp.ones((1, 1, 1)), jnp.ones((1, 1, 1), bool), 0)


def _batch(rows: int, length: int, chains: int = 1, boundaries: int = 3) -> Batch:
    zeros = np.zeros((rows, length), np.int32)
    places = np.zeros((rows, chains, boundaries), np.int32)
    return Batch(zeros, zeros, zeros, zeros.astype(np.float32), places, places.astype(bool))


def _published(states, head, rows, length, weights=LossWeights()):
    batch, path = _batch(rows, length), _states(5, rows, 1, 3, WIDTH)
    teacher = TeacherOutputs(_states(2, rows, length, WIDTH), None, {-1: path}, {})
    totals = denominators(batch)
    options = {"projections": Projections(), "weights": weights, "totals": totals, "vocab_size": VOCAB}
    return rtd(states, path, head, teacher, _states(3, WIDTH, VOCAB), batch, **options)[0]


def test_weights_of_the_published_objective_are_checked():
    for weights, message in (
        (LossWeights(alignment=math.nan), "weights.alignment is nan"),
        (LossWeights(coherence=-1.0), "weights.coherence is -1.0"),
        (LossWeights(alpha=2.0), "alpha is 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            _published(_states(0, 1, 4, WIDTH), _states(1, WIDTH, VOCAB), 1, 4, weights)


@pytest.mark.parametrize(("rows", "length"), [(2, 0), (0, 3), (0, 0)])
def test_no_rows_or_rows_without_tokens_give_zero_loss_and_zero_gradient(rows, length):
    states, head = _states(0, rows, length, WIDTH), _states(1, WIDTH, VOCAB)
    losses = {**_calls(rows, length), "rtd": lambda h, w: _published(h, w, rows, length)}
    for name, loss in losses.items():
        value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(states, head)
        assert float(value) == 0.0, name
        for gradient, of in zip(gradients, (states, head), strict=True):
            np.testing.assert_array_equal(gradient, np.zeros(of.shape), err_msg=name)
    top = top_k_predictions(states, head, k=2, temperature=4.0, vocab_size=VOCAB)
    assert top.ids_BLM.shape == (rows, length, 2)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 1), (0, 0)])
def test_no_chains_and_chains_without_boundaries_give_zero(shape):
    states, mask = _states(0, *shape, WIDTH), jnp.ones(shape, bool)
    other = _states(1, *shape, WIDTH)
    for loss in (coherence, alignment) if shape[-1] != 1 else (coherence,):
        value, gradient = jax.value_and_grad(loss)(states, other, mask)
        assert float(value) == 0.0
        np.testing.assert_array_equal(gradient, np.zeros(states.shape))


@pytest.mark.parametrize("seed", range(3))
def test_a_divergence_is_never_reported_below_zero_and_its_gradient_is_not_cut(seed):
    """Of two models that agree but for rounding, at a vocabulary at which a sum of it is 1e-5 below zero."""
    size = 128_256
    teacher = _states(seed, 8, size, scale=3.0)
    student = teacher * (1 + 1e-6 * _states(seed + 10, 8, size))
    labels = jnp.zeros(8, jnp.int32)
    soft, _, kl_T1, _ = kd_token_losses(student, teacher, labels, 2.0, size)
    assert float(jnp.min(soft)) >= 0.0
    assert float(jnp.min(kl_T1)) >= 0.0
    assert float(jnp.max(kl_T1)) < 1e-4
    # A head that is the identity, so that the fused sums see the same logits.
    top = top_k_predictions(teacher[None, :, :64], jnp.eye(64), k=8, temperature=2.0, vocab_size=64)
    sums = top_k_kd_sums(
        student[None, :, :64],
        jnp.eye(64),
        top,
        labels[None],
        jnp.ones((1, 8)),
        temperature=2.0,
        alpha=1.0,
        vocab_size=64,
    )
    assert float(sums.soft) >= 0.0
    assert float(sums.kl_T1) >= 0.0
    # Autodiff through the value gives the closed form's T (q - p), whether the value was cut or not.
    gradient = jax.grad(lambda z: jnp.sum(kd_token_losses(z, teacher, labels, 2.0, size)[0]))(student)
    expected = 2.0 * (jax.nn.softmax(student / 2.0) - jax.nn.softmax(teacher / 2.0))
    np.testing.assert_allclose(gradient, expected, atol=1e-9)


def test_what_is_cut_keeps_its_gradient():
    values = jnp.array([-1e-7, 0.5, 2.5, np.inf])
    np.testing.assert_array_equal(within(values, 0.0, 2.0)[:3], [0.0, 0.5, 2.0])
    np.testing.assert_array_equal(within(values, 0.0), [0.0, 0.5, 2.5, np.inf])
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(within(x, 0.0, 2.0)))(values), 1.0)


def test_cosine_distances_stay_between_0_and_2():
    states, mask = _states(0, 500, 3, 7), jnp.ones((500, 3), bool)
    same, opposite = boundary_losses(states, states, mask), boundary_losses(states, -states, mask)
    assert 0.0 <= float(jnp.min(same)) <= float(jnp.max(same)) < 1e-6
    assert 2.0 >= float(jnp.max(opposite)) >= float(jnp.min(opposite)) > 2 - 1e-6
    assert float(jnp.max(transition_losses(states, -states, mask))) <= 4.0


@pytest.mark.parametrize("scale", [1e-30, 5e37])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_states_of_extreme_length_have_the_losses_of_ordinary_ones(scale, dtype):
    """Value as at scale 1, and a finite gradient, of every loss on states; with one model or both out of scale."""
    student, teacher = (_states(seed, 3, 4, 16).astype(dtype) for seed in (0, 1))
    mask, square = jnp.ones((3, 4), bool), _states(2, 16, 16) / 4
    large = float(jnp.max(jnp.abs(student))), float(jnp.max(jnp.abs(teacher)))
    assert max(large) * 5e37 < 3e38  # as given, they are finite

    def scaled(x, factor):
        return (x.astype(jnp.float32) * np.float32(factor)).astype(dtype)

    losses = {
        "boundary": lambda s, t: boundary_losses(s, t, mask),
        "boundary, map": lambda s, t: boundary_losses(s, t, mask, square),
        "transition": lambda s, t: transition_losses(s, t, mask),
        "transition, map": lambda s, t: transition_losses(s, t, mask, square),
        "boundary, squared": lambda s, t: boundary_losses(s, t, mask, square, "squared"),
        "transition, squared": lambda s, t: transition_losses(s, t, mask, square, "squared"),
        "hint": lambda s, t: hint_losses(s, t, mask, square),
    }
    for name, loss in losses.items():
        compares_lengths = "squared" in name or name == "hint"
        both = [(scale, scale)] if compares_lengths else [(scale, scale), (scale, 1.0), (1.0, scale)]
        for of_student, of_teacher in both:
            states = scaled(student, of_student), scaled(teacher, of_teacher)
            expected = loss(scaled(states[0], 1 / of_student), scaled(states[1], 1 / of_teacher))
            value = jax.jit(loss)(*states)
            np.testing.assert_allclose(value, expected, rtol=2e-2 if dtype == jnp.bfloat16 else 1e-4, err_msg=name)
            gradient = jax.jit(jax.grad(lambda s, t, loss=loss: jnp.sum(loss(s, t))))(*states)
            assert np.all(np.isfinite(gradient.astype(jnp.float32))), name


def test_masked_slots_may_be_infinite_in_either_model():
    mask = jnp.array([[True, True, False, False], [False] * 4])
    student, teacher = (_states(seed, 2, 4, 8) for seed in (0, 1))
    for loss in (
        lambda s, t: jnp.sum(transition_losses(s, t, mask)),
        lambda s, t: jnp.sum(transition_losses(s, t, mask, jnp.eye(8), "squared")),
        lambda s, t: jnp.sum(boundary_losses(s, t, mask, jnp.eye(8))),
        lambda s, t: jnp.sum(boundary_losses(s, t, mask, jnp.eye(8), "squared")),
        lambda s, t: jnp.sum(hint_losses(s, t, mask, jnp.eye(8))),
    ):
        expected = jax.value_and_grad(loss)(student, teacher)
        for filler in (jnp.inf, jnp.nan, 3e38):
            dirty = [jnp.where(mask[..., None], x, filler) for x in (student, teacher)]
            for got, want in zip(jax.value_and_grad(loss)(*dirty), expected, strict=True):
                np.testing.assert_array_equal(got, want)


def test_logits_far_apart_give_finite_losses_and_gradients():
    """As large as float32 has them, of either sign; a teacher's token of probability 0 counts as nothing."""
    logits = jnp.array([[3e38, -3e38, 0.0], [-3e38, 3e38, 1.0], [1e30, 0.0, -1e30], [0.0, 5.0, -40.0]])
    labels = jnp.array([1, 0, 2, 0])
    for teacher in (logits, logits[::-1], jnp.zeros_like(logits)):
        value, gradient = jax.value_and_grad(
            lambda z, t=teacher: jnp.sum(sum(kd_token_losses(z, t, labels, 4.0, 3)[:2]))
        )(logits)
        assert np.isfinite(value)
        assert np.all(np.isfinite(gradient))
    ids = jnp.broadcast_to(jnp.arange(2), (1, 4, 2))
    certain = TopK(ids, jnp.tile(jnp.array([0.0, -jnp.inf]), (1, 4, 1)), jnp.zeros((1, 4)), jnp.zeros((1, 4)))
    sums = top_k_kd_sums(
        logits[None], jnp.eye(3), certain, labels[None], jnp.ones((1, 4)), temperature=4.0, alpha=1.0, vocab_size=3
    )
    assert all(np.isfinite(x) for x in sums)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("argument", "value"), [("vocab_size", None), ("vocab_size", 6.0), ("chunk_length", 1.5)])
def test_a_number_of_things_is_whole(name, argument, value):
    with pytest.raises(ValueError, match=f"{argument} is {value!r}; expected a whole number at least 1"):
        _calls(**{argument: value})[name](_states(0, 2, 3, WIDTH), _states(1, WIDTH, VOCAB))


@pytest.mark.parametrize("loss", [alignment, coherence])
def test_another_distance_is_refused(loss):
    states = _states(0, 2, 3, WIDTH)
    with pytest.raises(ValueError, match="distance is 'cosines'; use one of cosine, squared"):
        loss(states, states, jnp.ones((2, 3), bool), distance="cosines")


@pytest.mark.parametrize("loss", [alignment, coherence])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_states_of_zero_have_a_finite_gradient_in_every_dtype(loss, dtype):
    """In float16 too, whose range has no room for the factor that very short states of float32 are scaled by."""
    zeros, others = jnp.zeros((2, 3, WIDTH), dtype), _states(0, 2, 3, WIDTH).astype(dtype)
    for states in (zeros, others):
        gradient = jax.grad(lambda student, teacher=states: loss(student, teacher, jnp.ones((2, 3), bool)))(zeros)
        assert np.isfinite(np.asarray(gradient, np.float32)).all()
