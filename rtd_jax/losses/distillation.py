"""Knowledge distillation on logits, without ever holding the logits, and without computing them twice.

    KD = alpha * T^2 * KL(softmax(z_T / T) || softmax(z_S / T)) + (1 - alpha) * CE(z_S, label)

in nats per predicted token. At a 128k vocabulary one batch of logits is tens of gigabytes, so the LM heads are applied
inside the loss, a chunk of tokens at a time. While a chunk's logits exist, their gradient is formed as well and carried
on to the student's states and head: the backward pass only scales what is there, and nothing is recomputed: what
Liger-Kernel's fused linear losses do (Hsu et al., arXiv:2410.10989), here for two heads and in plain JAX.

The divergence is formed from differences of logits, sum_v p_T (z_T - z_S) / T + log Z_S - log Z_T, in float32: as a
difference of cross-entropy and entropy it would cancel to a few digits when teacher and student nearly agree. Source:
Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531; T^2 keeps the gradient's
size independent of T.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rtd_jax.common.reductions import safe_divide
from rtd_jax.common.types import Array
from rtd_jax.losses.fused import chunk_logits, fused_sums, whole_columns


class KDSums(NamedTuple):
    """Weighted sums over tokens, float32 scalars; divide each by `weight` for nats per predicted token.

    Only `loss` has a gradient.
    """

    loss: Array  # alpha * soft + (1 - alpha) * hard
    soft: Array  # T^2 * KL at temperature T
    hard: Array  # cross-entropy with the labels
    kl_T1: Array  # KL at temperature 1: the number that compares runs with different T
    correct: Array  # the label's logit is the largest
    weight: Array  # sum of loss weights


def kd_token_losses(
    student_logits: Array, teacher_logits: Array, labels: Array, temperature: Array | float, vocab_size: int
) -> tuple[Array, Array, Array, Array]:
    """Per-token (T^2 KL at temperature T, CE, KL at temperature 1, label's logit is the largest); each float32 [...].

    Args:
      student_logits, teacher_logits: [..., V]; rows of padding beyond `vocab_size` are ignored. The two V may differ in
        padding only.
      labels: int [...], ids of the predicted tokens.
      temperature: T > 0.
      vocab_size: number of real vocabulary entries.
    """
    soft, hard, kl_T1, correct, _, _ = _token_terms(student_logits, teacher_logits, labels, temperature, vocab_size)
    return soft, hard, jax.lax.stop_gradient(kl_T1), correct


def _token_terms(
    student_logits: Array, teacher_logits: Array, labels: Array, temperature: Array | float, vocab_size: int
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """The four losses of `kd_token_losses`, and the gradients of the first two, [..., V'], in closed form.

    d soft / d z_S = T (softmax(z_S / T) - softmax(z_T / T)) and d hard / d z_S = softmax(z_S) - onehot(label). Each
    exponential serves both its loss and its gradient: at a large vocabulary they are what the time goes into. V' is V,
    or `vocab_size` where the two differ in padding.
    """
    chex.assert_equal_shape_prefix([student_logits, teacher_logits], jnp.ndim(student_logits) - 1)
    chex.assert_shape(labels, student_logits.shape[:-1])
    # Padded rows are masked, not sliced: slicing a vocabulary-sharded axis would move data between devices.
    student, teacher = (_mask_padding(z.astype(jnp.float32), vocab_size) for z in (student_logits, teacher_logits))
    if student.shape[-1] != teacher.shape[-1]:
        student, teacher = student[..., :vocab_size], teacher[..., :vocab_size]
    student, teacher = _below_largest(student), _below_largest(jax.lax.stop_gradient(teacher))
    soft_student, soft_teacher = jnp.exp(student / temperature), jnp.exp(teacher / temperature)
    hard_student, hard_teacher = jnp.exp(student), jnp.exp(teacher)
    ahead = teacher - student

    def total(x: Array) -> Array:
        return jnp.sum(x, axis=-1, keepdims=True)

    sums = [total(x) for x in (soft_student, soft_teacher, hard_student, hard_teacher)]
    logs = [jnp.log(x) for x in sums]
    soft = temperature**2 * (total(soft_teacher * ahead) / (temperature * sums[1]) + logs[0] - logs[1])
    kl_T1 = total(hard_teacher * ahead) / sums[3] + logs[2] - logs[3]
    # As a comparison: indexing into a sharded vocabulary would gather it.
    is_label = jnp.arange(student.shape[-1]) == labels[..., None]
    at_label = total(jnp.where(is_label, student, 0.0))
    d_soft = temperature * (soft_student / sums[0] - soft_teacher / sums[1])
    d_hard = hard_student / sums[2] - is_label
    correct = (at_label >= 0.0).astype(jnp.float32)
    losses = (x[..., 0] for x in (soft, logs[2] - at_label, kl_T1, correct))
    soft, hard, kl_T1, correct = losses
    return soft, hard, kl_T1, correct, d_soft, d_hard


def _below_largest(logits: Array) -> Array:
    """Logits less the largest of each token, so that no exponential overflows; no softmax depends on it."""
    return logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))


def kd(
    student_hidden_BLS: Array,
    student_head_SV: Array,
    teacher_hidden_BLD: Array,
    teacher_head_DV: Array,
    labels_BL: Array,
    weights_BL: Array,
    *,
    vocab_size: int,
    temperature: Array | float = 4.0,
    alpha: Array | float = 0.7,
    chunk_length: int = 32,
) -> Array:
    """alpha * T^2 * KL(teacher_T || student_T) + (1 - alpha) * CE, in nats per predicted token; float32 scalar.

    Arguments as in `kd_sums`. 0 when no token has weight.
    """
    sums = kd_sums(
        student_hidden_BLS,
        student_head_SV,
        teacher_hidden_BLD,
        teacher_head_DV,
        labels_BL,
        weights_BL,
        temperature=temperature,
        alpha=alpha,
        vocab_size=vocab_size,
        chunk_length=chunk_length,
    )
    return safe_divide(sums.loss, sums.weight)


def kd_sums(
    student_hidden_BLS: Array,
    student_head_SV: Array,
    teacher_hidden_BLD: Array,
    teacher_head_DV: Array,
    labels_BL: Array,
    weights_BL: Array,
    *,
    temperature: Array | float,
    alpha: Array | float,
    vocab_size: int,
    chunk_length: int = 32,
    mesh: Mesh | None = None,
) -> KDSums:
    """Weighted sums of the distillation losses over tokens, LM heads fused in.

    Args:
      student_hidden_BLS, teacher_hidden_BLD: states the heads read, any float dtype.
      student_head_SV, teacher_head_DV: LM heads; products accumulate in float32.
      labels_BL: int32, the token predicted *at* each position (already shifted).
      weights_BL: float32 loss weights; tokens of weight 0 contribute nothing, whatever they hold.
      temperature: T > 0, traced or not.
      alpha: share of the soft loss in `loss`, traced or not.
      vocab_size: real vocabulary entries; the rest of V is padding and gets no probability.
      chunk_length: positions of each row whose logits exist at one time: memory is B * chunk_length * V.
      mesh: where the arrays lie, rows over (data, fsdp) and the vocabulary over tensor. The logits then stay where they
        are formed, and the head's gradient is summed over devices once, at the end; the row axes divide B.

    Returns:
      KDSums; `loss` is differentiable with respect to the student's states and head, and to nothing else.
    """
    chex.assert_rank([student_hidden_BLS, teacher_hidden_BLD], 3)
    chex.assert_rank([student_head_SV, teacher_head_DV], 2)
    chex.assert_equal_shape_prefix([student_hidden_BLS, teacher_hidden_BLD, labels_BL, weights_BL], 2)

    def losses(student_logits: Array, constants: tuple, chunk: tuple) -> tuple[Array, tuple[Array, ...], Array]:
        teacher_head, temperature, alpha = constants
        weights, labels, teacher_hidden = chunk
        teacher_logits = chunk_logits(teacher_hidden, teacher_head, weights, mesh)
        labels = jnp.where(weights > 0, labels, 0)
        *tokens, d_soft, d_hard = _token_terms(student_logits, teacher_logits, labels, temperature, vocab_size)
        soft, hard, kl_T1, correct = (jnp.sum(weights * loss) for loss in tokens)
        d_logits = weights[..., None] * (alpha * d_soft + (1.0 - alpha) * d_hard)
        return alpha * soft + (1.0 - alpha) * hard, (soft, hard, kl_T1, correct, jnp.sum(weights)), d_logits

    loss, others = fused_sums(
        losses,
        chunk_length,
        mesh,
        student_hidden_BLS,
        student_head_SV,
        (
            whole_columns(teacher_head_DV, teacher_hidden_BLD, mesh),
            jnp.asarray(temperature, jnp.float32),
            jnp.asarray(alpha, jnp.float32),
        ),
        (weights_BL, labels_BL, teacher_hidden_BLD),
    )
    return KDSums(loss, *jax.lax.stop_gradient(others))


def cross_entropy_sums(
    hidden_BLD: Array, head_DV: Array, labels_BL: Array, weights_BL: Array, *, vocab_size: int, chunk_length: int = 32
) -> tuple[Array, Array]:
    """Weighted sum of the cross-entropy over tokens (nats), and the sum of weights; the head fused in (`kd_sums`)."""
    chex.assert_equal_shape_prefix([hidden_BLD, labels_BL, weights_BL], 2)

    def losses(logits: Array, _: tuple, chunk: tuple) -> tuple[Array, Array, Array]:
        weights, labels = chunk
        log_probs = jax.nn.log_softmax(_mask_padding(logits, vocab_size))
        is_label = jnp.arange(logits.shape[-1]) == jnp.where(weights > 0, labels, 0)[..., None]
        loss = -jnp.sum(weights[..., None] * jnp.where(is_label, log_probs, 0.0))
        return loss, jnp.sum(weights), weights[..., None] * (jnp.exp(log_probs) - is_label)

    loss, weight = fused_sums(losses, chunk_length, None, hidden_BLD, head_DV, (), (weights_BL, labels_BL))
    return loss, jax.lax.stop_gradient(weight)


def _mask_padding(logits: Array, vocab_size: int) -> Array:
    if logits.shape[-1] == vocab_size:
        return logits
    # A large finite number instead of -inf: p * (log p - log q) at p = 0 would be 0 * (-inf + inf).
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -1e30)
