"""Knowledge distillation on logits, without ever holding the logits, and without computing them twice.

    KD = alpha * T^2 * KL(softmax(z_T / T) || softmax(z_S / T)) + (1 - alpha) * CE(z_S, label)

in nats per predicted token, or another divergence in the place of KL (`losses.divergences`). At a 128k vocabulary one
batch of logits is tens of gigabytes, so the LM heads are applied inside the loss, a chunk of tokens at a time. While a
chunk's logits exist, the gradients of the student's states and head are computed from them. The backward pass only
scales these and recomputes nothing. Liger-Kernel's fused linear losses do the same (Hsu et al., arXiv:2410.10989); here
it is done for two heads and in plain JAX.

Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531; T^2 keeps the
gradient's size independent of T.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rtd_jax.base.means import safe_divide
from rtd_jax.base.types import Array, TopK
from rtd_jax.losses.checks import check_number, check_temperature, check_vocabulary
from rtd_jax.losses.divergences import Divergence, Terms, check_divergence, mask_padding, token_terms, top_k_terms
from rtd_jax.losses.fused import chunk_logits, fused_sums, whole_columns


class KDSums(NamedTuple):
    """Weighted sums over tokens, float32 scalars; divide each by `weight` for nats per predicted token.

    Only `loss` has a gradient.
    """

    loss: Array  # alpha * soft + (1 - alpha) * hard
    soft: Array  # T^2 * the divergence at temperature T
    hard: Array  # cross-entropy with the labels
    kl_T1: Array  # forward KL at temperature 1: the number that compares runs with different T and divergences
    correct: Array  # the label's logit is the largest
    weight: Array  # sum of loss weights


def kd_token_losses(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array,
    temperature: Array | float,
    vocab_size: int,
    divergence: Divergence = "forward_kl",
    beta: Array | float = 0.5,
) -> tuple[Array, Array, Array, Array]:
    """Per-token (T^2 KL at temperature T, CE, KL at temperature 1, label's logit is the largest); each float32 [...].

    The first is T^2 times another divergence where one is named.

    Args:
      student_logits, teacher_logits: [..., V]; rows of padding beyond `vocab_size` are ignored. The two V may differ in
        padding only.
      labels: int [...], ids of the predicted tokens.
      temperature: T, from 0.001 to 1e6.
      vocab_size: number of real vocabulary entries.
      divergence, beta: see `kd_sums`.

    Raises:
      ValueError: a plain `temperature` or `beta` out of range, an unknown `divergence`, or `vocab_size` below 1 or
        above V.
    """
    _check(temperature, divergence, beta)
    check_vocabulary(vocab_size, student_logits=student_logits, teacher_logits=teacher_logits)
    terms = token_terms(student_logits, teacher_logits, labels, temperature, vocab_size, divergence, beta)
    return terms.soft, terms.hard, jax.lax.stop_gradient(terms.kl_T1), terms.correct


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
    divergence: Divergence = "forward_kl",
    beta: Array | float = 0.5,
) -> Array:
    """alpha * T^2 * KL(teacher_T || student_T) + (1 - alpha) * CE, in nats per predicted token; float32 scalar.

    Another divergence takes the place of KL where one is named. Arguments and what is raised as in `kd_sums`. 0 when no
    token has weight, or there is none.
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
        divergence=divergence,
        beta=beta,
    )
    return safe_divide(sums.loss, sums.weight)


@jax.named_scope("kd")
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
    divergence: Divergence = "forward_kl",
    beta: Array | float = 0.5,
) -> KDSums:
    """Weighted sums of the distillation losses over tokens, LM heads fused in.

    Args:
      student_hidden_BLS, teacher_hidden_BLD: states the heads read, any float dtype.
      student_head_SV, teacher_head_DV: LM heads; products accumulate in float32.
      labels_BL: int32, the token predicted *at* each position (already shifted).
      weights_BL: float32 loss weights; tokens of weight 0 contribute nothing, whatever they hold.
      temperature: T, from 0.001 to 1e6, traced or not.
      alpha: share of the soft loss in `loss`, from 0 to 1, traced or not.
      vocab_size: real vocabulary entries; the rest of V is padding and gets no probability.
      chunk_length: positions of each row whose logits exist at one time: memory is B * chunk_length * V.
      mesh: where the arrays lie, rows over (data, fsdp) and the vocabulary over tensor. The logits then stay where they
        are formed, and the head's gradient is summed over devices once, at the end; the row axes divide B.
      divergence: of teacher p and student q at temperature T in the soft loss. "forward_kl" is KL(p || q), "reverse_kl"
        KL(q || p), "jsd" beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, "skewed_kl"
        KL(p || beta p + (1 - beta) q), "skewed_reverse_kl" KL(q || (1 - beta) p + beta q). `losses.divergences` has the
        sources, and what is done where p is 0.
      beta: from 0 to 1, traced or not. "jsd" is the forward KL at 0 and the reverse KL at 1; the skewed ones are the
        plain ones at 0, and 0 at 1; the other two do not read it.

    Returns:
      KDSums; `loss` is differentiable with respect to the student's states and head, and to nothing else.

    Raises:
      ValueError: a head has fewer than `vocab_size` columns, a plain argument is out of range, or there is no such
        divergence.
    """
    check_vocabulary(vocab_size, student_head_SV=student_head_SV, teacher_head_DV=teacher_head_DV)
    chex.assert_rank([student_hidden_BLS, teacher_hidden_BLD], 3)
    chex.assert_rank([student_head_SV, teacher_head_DV], 2)
    chex.assert_equal_shape_prefix([student_hidden_BLS, teacher_hidden_BLD, labels_BL, weights_BL], 2)

    def terms(student_logits: Array, labels: Array, weights: Array, traced: _Traced, head: Any, hidden: Any) -> Terms:
        teacher_logits = chunk_logits(hidden, head, weights, mesh)
        logits = student_logits, teacher_logits
        return token_terms(*logits, labels, traced.temperature, vocab_size, divergence, traced.beta)

    head_DV = whole_columns(teacher_head_DV, teacher_hidden_BLD, mesh)
    student = student_hidden_BLS, student_head_SV
    tokens = weights_BL, labels_BL, teacher_hidden_BLD
    _check(temperature, divergence, beta, alpha)
    return _weighted_sums(terms, student, tokens, head_DV, _traced(temperature, alpha, beta), chunk_length, mesh)


def top_k_kd_sums(
    student_hidden_BLS: Array,
    student_head_SV: Array,
    top: TopK,
    labels_BL: Array,
    weights_BL: Array,
    *,
    temperature: Array | float,
    alpha: Array | float,
    vocab_size: int,
    chunk_length: int = 32,
    mesh: Mesh | None = None,
    divergence: Divergence = "forward_kl",
    beta: Array | float = 0.5,
) -> KDSums:
    """The sums of `kd_sums` from a teacher's cached predictions: k tokens, and one bucket for the rest.

    `soft` and `kl_T1` are T^2 times the divergence, and KL, over these k + 1 buckets: never negative, at most those
    over all tokens, and equal to them at k = V. Arguments and result as in `kd_sums`, but for:

    Args:
      top: see `TopK`; `soft_tail_BL` belongs to `temperature`. What it holds at tokens of weight 0 is not read.
    """
    check_vocabulary(vocab_size, student_head_SV=student_head_SV)
    chex.assert_rank([student_hidden_BLS, top.ids_BLM, top.log_probs_BLM], 3)
    chex.assert_equal_shape([top.ids_BLM, top.log_probs_BLM])
    chex.assert_equal_shape([labels_BL, weights_BL, top.tail_BL, top.soft_tail_BL])
    chex.assert_equal_shape_prefix([student_hidden_BLS, top.ids_BLM, labels_BL], 2)

    def terms(logits: Array, labels: Array, weights: Array, traced: _Traced, _: Any, *top: Any) -> Terms:
        is_read = weights > 0
        entries = jnp.arange(top[0].shape[-1])
        top = TopK(*(jnp.where(is_read.reshape(is_read.shape + (1,) * (x.ndim - 2)), x, 0) for x in top))
        top = top._replace(ids_BLM=jnp.where(is_read[..., None], top.ids_BLM, entries))  # distinct, as everywhere
        return top_k_terms(logits, top, labels, traced.temperature, vocab_size, mesh, divergence, traced.beta)

    student, tokens = (student_hidden_BLS, student_head_SV), (weights_BL, labels_BL, *top)
    _check(temperature, divergence, beta, alpha)
    return _weighted_sums(terms, student, tokens, None, _traced(temperature, alpha, beta), chunk_length, mesh)


class _Traced(NamedTuple):
    """The numbers that may change without compiling anew, float32 scalars."""

    temperature: Array
    alpha: Array
    beta: Array


def _traced(*numbers: Array | float) -> _Traced:
    return _Traced(*(jnp.asarray(number, jnp.float32) for number in numbers))


def _check(temperature: Array | float, divergence: str, beta: Array | float, alpha: Array | float = 1.0) -> None:
    check_temperature(temperature)
    check_divergence(divergence)
    check_number("beta", beta, 0.0, 1.0)
    check_number("alpha", alpha, 0.0, 1.0)


def _weighted_sums(
    terms: Callable[..., Terms],
    student: tuple[Array, Array],
    tokens: tuple[Array, ...],
    constant: Array | None,
    traced: _Traced,
    chunk_length: int,
    mesh: Mesh | None,
) -> KDSums:
    """Sums over chunks of `terms(student logits, labels, weights, traced, constant, *others)`.

    Args:
      student: states and head.
      tokens: loss weights, labels, and what else `terms` reads of each token, [B, L, ...].
    """

    def losses(logits: Array, constants: tuple, chunk: tuple) -> tuple[Array, tuple[Array, ...], Array]:
        constant, traced = constants
        alpha = traced.alpha
        weights, labels, *others = chunk
        labels = jnp.where(weights > 0, labels, 0)
        *values, d_soft, d_hard = terms(logits, labels, weights, traced, constant, *others)
        soft, hard, kl_T1, correct = (jnp.sum(weights * value) for value in values)
        d_logits = weights[..., None] * (alpha * d_soft + (1.0 - alpha) * d_hard)
        return alpha * soft + (1.0 - alpha) * hard, (soft, hard, kl_T1, correct, jnp.sum(weights)), d_logits

    loss, others = fused_sums(losses, chunk_length, mesh, *student, (constant, traced), tokens)
    return KDSums(loss, *jax.lax.stop_gradient(others))


def cross_entropy_sums(
    hidden_BLD: Array,
    head_DV: Array,
    labels_BL: Array,
    weights_BL: Array,
    *,
    vocab_size: int,
    chunk_length: int = 32,
    mesh: Mesh | None = None,
) -> tuple[Array, Array]:
    """Weighted sum of the cross-entropy over tokens (nats), and the sum of weights; the head fused in (`kd_sums`)."""
    check_vocabulary(vocab_size, head_DV=head_DV)
    chex.assert_equal_shape_prefix([hidden_BLD, labels_BL, weights_BL], 2)

    def losses(logits: Array, _: tuple, chunk: tuple) -> tuple[Array, Array, Array]:
        weights, labels = chunk
        log_probs = jax.nn.log_softmax(mask_padding(logits, vocab_size))
        is_label = jnp.arange(logits.shape[-1]) == jnp.where(weights > 0, labels, 0)[..., None]
        loss = -jnp.sum(weights[..., None] * jnp.where(is_label, log_probs, 0.0))
        return loss, jnp.sum(weights), weights[..., None] * (jnp.exp(log_probs) - is_label)

    loss, weight = fused_sums(losses, chunk_length, mesh, hidden_BLD, head_DV, (), (weights_BL, labels_BL))
    return loss, jax.lax.stop_gradient(weight)
