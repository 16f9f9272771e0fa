"""The chunked KD loss equals its dense definition, and counts exactly the tokens it should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtd_jax.apps.plan.program import matmul_flops
from rtd_jax.losses import cross_entropy_sums, kd, kd_sums, kd_token_losses
from rtd_jax.losses.policy import policy_sums, token_log_probs

ROWS, LENGTH, STUDENT_WIDTH, TEACHER_WIDTH, VOCAB = 3, 7, 8, 12, 20


def _inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 6)
    return {
        "student_hidden_BLS": jax.random.normal(keys[0], (ROWS, LENGTH, STUDENT_WIDTH)).astype(dtype),
        "student_head_SV": jax.random.normal(keys[1], (STUDENT_WIDTH, VOCAB)).astype(dtype),
        "teacher_hidden_BLD": jax.random.normal(keys[2], (ROWS, LENGTH, TEACHER_WIDTH)).astype(dtype),
        "teacher_head_DV": jax.random.normal(keys[3], (TEACHER_WIDTH, VOCAB)).astype(dtype),
        "labels_BL": jax.random.randint(keys[4], (ROWS, LENGTH), 0, VOCAB),
        "weights_BL": (jax.random.uniform(keys[5], (ROWS, LENGTH)) > 0.4).astype(jnp.float32),
    }


def _dense(inputs, temperature, alpha, vocab_size=VOCAB):
    """The definition, with all logits in float32."""
    student = inputs["student_hidden_BLS"].astype(jnp.float32) @ inputs["student_head_SV"].astype(jnp.float32)
    teacher = inputs["teacher_hidden_BLD"].astype(jnp.float32) @ inputs["teacher_head_DV"].astype(jnp.float32)
    student, teacher = student[..., :vocab_size], teacher[..., :vocab_size]
    p = jax.nn.softmax(teacher / temperature)
    kl = jnp.sum(p * (jax.nn.log_softmax(teacher / temperature) - jax.nn.log_softmax(student / temperature)), -1)
    one_hot = jax.nn.one_hot(inputs["labels_BL"], vocab_size)
    ce = -jnp.sum(one_hot * jax.nn.log_softmax(student), -1)
    loss = alpha * temperature**2 * kl + (1 - alpha) * ce
    weights = inputs["weights_BL"]
    return jnp.sum(loss * weights) / jnp.sum(weights)


def test_kl_by_hand():
    # softmax(log p) = p. Teacher (1/2, 1/2), student (1/4, 3/4): KL = ln 2 - ln(3) / 2 + ln(2) / 2 ... at T = 1:
    # 1/2 ln(2) + 1/2 ln(2/3) nats; CE with label 1 = -ln(3/4).
    teacher, student = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    soft, hard, kl_T1, correct = kd_token_losses(student, teacher, jnp.array(1), 1.0, 2)
    np.testing.assert_allclose(soft, 0.5 * np.log(2) + 0.5 * np.log(2 / 3), rtol=1e-6)
    np.testing.assert_allclose(kl_T1, soft, rtol=1e-6)
    np.testing.assert_allclose(hard, -np.log(0.75), rtol=1e-6)
    assert float(correct) == 1.0
    # At T = 2 the probabilities are square roots, renormalised: student (1, sqrt 3) / (1 + sqrt 3). Times T^2 = 4.
    q = np.array([1, np.sqrt(3)]) / (1 + np.sqrt(3))
    soft_T2, _, kl_again, _ = kd_token_losses(student, teacher, jnp.array(1), 2.0, 2)
    np.testing.assert_allclose(soft_T2, 4 * np.sum(0.5 * np.log(0.5 / q)), rtol=1e-6)
    np.testing.assert_allclose(kl_again, kl_T1, rtol=1e-6)


@pytest.mark.parametrize("chunk_length", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(("temperature", "alpha"), [(4.0, 0.7), (1.0, 1.0)])
def test_chunked_equals_dense_in_value_and_gradient(chunk_length, temperature, alpha):
    inputs = _inputs()
    names = ("student_hidden_BLS", "student_head_SV")

    def chunked(*args):
        return kd(
            **{**inputs, **dict(zip(names, args, strict=True))},
            temperature=temperature,
            alpha=alpha,
            vocab_size=VOCAB,
            chunk_length=chunk_length,
        )

    def dense(*args):
        return _dense({**inputs, **dict(zip(names, args, strict=True))}, temperature, alpha)

    args = tuple(inputs[name] for name in names)
    value, gradients = jax.value_and_grad(chunked, argnums=(0, 1))(*args)
    expected, expected_gradients = jax.value_and_grad(dense, argnums=(0, 1))(*args)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, want in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_bfloat16_inputs_accumulate_in_float32():
    value = kd(**_inputs(jnp.bfloat16), vocab_size=VOCAB)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, _dense(_inputs(jnp.bfloat16), 4.0, 0.7), rtol=2e-2)


def test_zero_for_equal_models_and_never_negative():
    inputs = _inputs()
    same = {**inputs, "teacher_hidden_BLD": inputs["student_hidden_BLS"], "teacher_head_DV": inputs["student_head_SV"]}
    assert abs(float(kd_sums(**same, temperature=4.0, alpha=1.0, vocab_size=VOCAB).soft)) < 1e-5
    assert float(kd_sums(**inputs, temperature=4.0, alpha=1.0, vocab_size=VOCAB).soft) > 0


def test_masked_tokens_contribute_nothing_even_when_not_finite():
    inputs = _inputs()
    keep = (inputs["weights_BL"] > 0)[..., None]
    dirty = {
        **inputs,
        "student_hidden_BLS": jnp.where(keep, inputs["student_hidden_BLS"], jnp.nan),
        "teacher_hidden_BLD": jnp.where(keep, inputs["teacher_hidden_BLD"], jnp.inf),
        "labels_BL": jnp.where(keep[..., 0], inputs["labels_BL"], -100),
    }

    def loss(hidden, head, other):
        return kd(**{**other, "student_hidden_BLS": hidden, "student_head_SV": head}, vocab_size=VOCAB)

    gradient = jax.value_and_grad(loss, argnums=(0, 1))
    value, (d_hidden, d_head) = gradient(dirty["student_hidden_BLS"], dirty["student_head_SV"], dirty)
    expected, (_, want_head) = gradient(inputs["student_hidden_BLS"], inputs["student_head_SV"], inputs)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(d_head, want_head)
    assert np.all(np.asarray(d_hidden)[~np.asarray(keep[..., 0])] == 0)


def test_no_predicted_token_gives_zero():
    inputs = {**_inputs(), "weights_BL": jnp.zeros((ROWS, LENGTH))}
    assert float(kd(**inputs, vocab_size=VOCAB)) == 0.0


def test_padded_vocabulary_gets_no_probability():
    """Padding rows of the head hold anything; the loss is that of the real vocabulary, and no gradient reaches them."""
    inputs = _inputs()
    real = 17
    inputs["labels_BL"] = inputs["labels_BL"] % real
    inputs["student_head_SV"] = inputs["student_head_SV"].at[:, real:].set(50.0)

    def loss(head):
        return kd(**{**inputs, "student_head_SV": head}, vocab_size=real)

    value, gradient = jax.value_and_grad(loss)(inputs["student_head_SV"])
    np.testing.assert_allclose(value, _dense(inputs, 4.0, 0.7, vocab_size=real), rtol=1e-5)
    np.testing.assert_array_equal(gradient[:, real:], 0.0)


def test_teacher_and_student_may_pad_the_vocabulary_differently():
    inputs = _inputs()
    wide = {**inputs, "teacher_head_DV": jnp.pad(inputs["teacher_head_DV"], ((0, 0), (0, 4)))}
    np.testing.assert_allclose(kd(**wide, vocab_size=VOCAB), kd(**inputs, vocab_size=VOCAB), rtol=1e-6)


def test_teacher_gets_no_gradient():
    inputs = _inputs()
    gradient = jax.grad(lambda h: kd(**{**inputs, "teacher_hidden_BLD": h}, vocab_size=VOCAB))
    np.testing.assert_array_equal(gradient(inputs["teacher_hidden_BLD"]), 0.0)


def test_cross_entropy_equals_dense():
    inputs = _inputs()
    total, weight = cross_entropy_sums(
        inputs["student_hidden_BLS"],
        inputs["student_head_SV"],
        inputs["labels_BL"],
        inputs["weights_BL"],
        vocab_size=VOCAB,
        chunk_length=3,
    )
    np.testing.assert_allclose(total / weight, _dense(inputs, 1.0, 0.0), rtol=1e-5)


def test_logits_of_the_whole_batch_never_exist():
    """No value in the differentiated program has L * V entries per row: memory follows the chunk, not the length."""
    inputs = _inputs()
    wide = {
        **inputs,
        "student_head_SV": jnp.ones((STUDENT_WIDTH, 1000)),
        "teacher_head_DV": jnp.ones((TEACHER_WIDTH, 1000)),
    }

    def loss(hidden):
        return kd(**{**wide, "student_hidden_BLS": hidden}, vocab_size=1000, chunk_length=1)

    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(inputs["student_hidden_BLS"]))
    assert f"{ROWS},1,1000]" in jaxpr
    assert f"{ROWS},{LENGTH},1000]" not in jaxpr
    assert f"{LENGTH},{ROWS},1,1000]" not in jaxpr


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_formed_once_in_little_memory(dtype):
    """Four matrix products, as many as with all logits at hand; and a small part of the logits' memory."""
    rows, length, width, vocab = 4, 128, 64, 4096

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype)

    arguments = (
        shape(rows, length, width),
        shape(width, vocab),
        shape(rows, length, 2 * width),
        shape(2 * width, vocab),
        shape(rows, length, dtype=jnp.int32),
        shape(rows, length, dtype=jnp.float32),
    )
    step = jax.jit(jax.value_and_grad(lambda *x: kd(*x, vocab_size=vocab, chunk_length=8), argnums=(0, 1)))
    one = 2 * rows * length * width * vocab
    assert matmul_flops(step.trace(*arguments).jaxpr.jaxpr) == (1 + 2 + 2) * one  # the teacher is twice as wide
    temporaries = step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < 0.7 * rows * length * vocab * 4

    forward = jax.jit(lambda *x: kd(*x, vocab_size=vocab, chunk_length=8))
    assert matmul_flops(forward.trace(*arguments).jaxpr.jaxpr) == (1 + 2) * one  # nothing for gradients not asked for


def test_bfloat16_gradients_are_near_those_of_float32():
    inputs = _inputs(jnp.bfloat16)
    names = ("student_hidden_BLS", "student_head_SV")
    args = tuple(inputs[name] for name in names)

    def loss(function):
        return lambda *args: function({**inputs, **dict(zip(names, args, strict=True))})

    got = jax.grad(loss(lambda x: kd(**x, vocab_size=VOCAB)), argnums=(0, 1))(*args)
    want = jax.grad(loss(lambda x: _dense(x, 4.0, 0.7)), argnums=(0, 1))(*args)
    for gradient, expected in zip(got, want, strict=True):
        assert gradient.dtype == jnp.bfloat16
        scale = float(jnp.max(jnp.abs(expected)))
        np.testing.assert_allclose(
            gradient.astype(jnp.float32), expected.astype(jnp.float32), rtol=2e-2, atol=2e-2 * scale
        )


def test_a_scaled_loss_scales_its_gradient_and_the_other_sums_have_none():
    inputs = _inputs()

    def of(function):
        return jax.grad(
            lambda h: function(
                kd_sums(**{**inputs, "student_hidden_BLS": h}, temperature=2.0, alpha=0.3, vocab_size=VOCAB)
            )
        )(inputs["student_hidden_BLS"])

    np.testing.assert_allclose(of(lambda sums: -3.0 * sums.loss), -3.0 * of(lambda sums: sums.loss), rtol=1e-6)
    np.testing.assert_array_equal(of(lambda sums: sums.soft + sums.hard + sums.kl_T1), 0.0)


def _factor(got, want):
    """By how much `want` has to be multiplied to fit `got` best, in float64."""
    got, want = (np.asarray(x.astype(jnp.float32), np.float64).ravel() for x in (got, want))
    return got @ want / (want @ want)


@pytest.mark.parametrize("tokens", [256, 257, 771, 771 * 17, 65283, 1e6 + 3])
def test_the_scale_of_a_loss_is_not_rounded_to_the_states_dtype(tokens):
    """With bfloat16 states and head, 1 / tokens reaches their gradients with float32's digits, whatever the loss."""
    keys = jax.random.split(jax.random.key(1), 6)
    shapes = (4, 64, 32), (32, 50), (4, 64, 32), (32, 50)
    arrays = [(0.5 * jax.random.normal(*x)).astype(jnp.bfloat16) for x in zip(keys, shapes, strict=False)]
    labels, weights = jax.random.randint(keys[4], (4, 64), 0, 50), jnp.ones((4, 64))
    drawn = token_log_probs(*arrays[:2], labels, weights, temperature=1.0, vocab_size=50)  # every ratio is 1
    draws = drawn, jnp.where(jax.random.bernoulli(keys[5], shape=(4, 64)), 1.0, -1.0)
    losses = {
        "kd": lambda h, w: kd_sums(h, w, *arrays[2:], labels, weights, temperature=4.0, alpha=0.7, vocab_size=50).loss,
        "labels": lambda h, w: cross_entropy_sums(h, w, labels, weights, vocab_size=50)[0],
        "policy": lambda h, w: (
            policy_sums(h, w, labels, weights, *draws, temperature=1.0, clip=0.2, vocab_size=50).loss
        ),
    }
    for name, loss in losses.items():
        gradients = jax.grad(lambda h, w, loss=loss: loss(h, w) / tokens, argnums=(0, 1))(*arrays[:2])
        whole = jax.grad(loss, argnums=(0, 1))(*arrays[:2])
        for gradient, expected in zip(gradients, whole, strict=True):
            assert gradient.dtype == jnp.bfloat16
            assert abs(_factor(gradient, expected) * tokens - 1) < 2**-12, name
        if name == "kd":
            exact = jax.grad(loss, argnums=(0, 1))(*(x.astype(jnp.float32) for x in arrays[:2]))
            assert all(abs(_factor(g, x) * tokens - 1) < 2**-12 for g, x in zip(gradients, exact, strict=True))
