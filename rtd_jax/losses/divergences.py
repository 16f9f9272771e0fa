"""Distillation losses of each token, given its logits, together with their gradients in closed form.

The forward KL is formed from differences of logits, sum_v p_T (z_T - z_S) / T + log Z_S - log Z_T, in float32: as a
difference of cross-entropy and entropy it would cancel to a few digits when teacher and student nearly agree. What
rounding leaves below 0 (1e-5 at a vocabulary of 128,256) is reported as 0; the gradients do not depend on it.

The other divergences are one formula with three numbers. With teacher p and student q,

    D = a KL(p || m) + b KL(q || m),   m = s p + (1 - s) q

    divergence          a     b         s         source
    forward_kl          1     0         0         Hinton et al., arXiv:1503.02531
    reverse_kl          0     1         1         Gu et al., "MiniLLM", arXiv:2306.08543
    jsd                 beta  1 - beta  beta      Agarwal et al., "GKD", arXiv:2306.13649, equation 1
    skewed_kl           1     0         beta      Ko et al., "DistiLLM", arXiv:2402.03898
    skewed_reverse_kl   0     1         1 - beta  the same

The JSD vanishes as beta goes to 0 or 1; divided by beta, or by 1 - beta, it tends to KL(p || q) and KL(q || p). As in
TRL's `GKDTrainer`, beta = 0 and beta = 1 give just these two.

Where the teacher gives a token no probability at all, KL(q || p) is infinite. There the teacher's probability counts as
1e-37, about the least that float32 holds, or as the student's if that is less: log q - log p is at most 85.
"""

import math
from typing import Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rtd_jax.base.means import within
from rtd_jax.base.sharding import ROW_AXES, mesh_spec
from rtd_jax.base.types import Array, TopK

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl", "skewed_reverse_kl"]
READ_BETA = ("jsd", "skewed_kl", "skewed_reverse_kl")
_TINY = 1e-37  # keeps logarithms and quotients of a mass that underflowed finite


class Terms(NamedTuple):
    """The losses of each token, float32 [...], and the gradients of the first two by the student's logits, [..., V]."""

    soft: Array
    hard: Array
    kl_T1: Array
    correct: Array
    d_soft: Array
    d_hard: Array


def check_divergence(divergence: str) -> None:
    """Raises ValueError where there is no such divergence."""
    if divergence not in get_args(Divergence):
        raise ValueError(f"divergence is {divergence!r}; use one of {', '.join(get_args(Divergence))}")


def token_terms(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array,
    temperature: Array | float,
    vocab_size: int,
    divergence: Divergence = "forward_kl",
    beta: Array | float = 0.5,
) -> Terms:
    """The terms of `kd_token_losses`. Gradients are of `vocab_size` where the two models' V differ in padding.

    For the forward KL d soft / d z_S = T (softmax(z_S / T) - softmax(z_T / T)), for the others see `_mixture_terms`;
    d hard / d z_S = softmax(z_S) - onehot(label). Each exponential serves both its loss and its gradient: at a large
    vocabulary they are what the time goes into.
    """
    chex.assert_equal_shape_prefix([student_logits, teacher_logits], jnp.ndim(student_logits) - 1)
    chex.assert_shape(labels, student_logits.shape[:-1])
    # Padded rows are masked, not sliced: slicing a vocabulary-sharded axis would move data between devices.
    student, teacher = (mask_padding(z.astype(jnp.float32), vocab_size) for z in (student_logits, teacher_logits))
    if student.shape[-1] != teacher.shape[-1]:
        student, teacher = student[..., :vocab_size], teacher[..., :vocab_size]
    student, teacher = _below_largest(student), _below_largest(jax.lax.stop_gradient(teacher))
    soft_student, soft_teacher = jnp.exp(student / temperature), jnp.exp(teacher / temperature)
    hard_student, hard_teacher = jnp.exp(student), jnp.exp(teacher)
    difference = teacher - student
    sums = [_total(x) for x in (soft_student, soft_teacher, hard_student, hard_teacher)]
    logs = [jnp.log(x) for x in sums]
    kl_T1 = _total(hard_teacher * difference) / sums[3] + logs[2] - logs[3]
    if divergence == "forward_kl":
        soft = temperature**2 * (_total(soft_teacher * difference) / (temperature * sums[1]) + logs[0] - logs[1])
        d_soft = temperature * (soft_student / sums[0] - soft_teacher / sums[1])
    else:
        p, q, log_q = soft_teacher / sums[1], soft_student / sums[0], student / temperature - logs[0]
        log_ratio = difference / temperature + jnp.log(sums[0] / sums[1])
        values, slopes = _mixture_terms(p, q, log_q, log_ratio, divergence, beta)
        soft, d_soft = temperature**2 * _total(values), temperature * (slopes - q * _total(slopes))
    hard, correct, d_hard = _label_terms(student, hard_student, sums[2], labels)
    return Terms(within(soft[..., 0], 0.0), hard, within(kl_T1[..., 0], 0.0), correct, d_soft, d_hard)


def top_k_terms(
    student_logits: Array,
    top: TopK,
    labels: Array,
    temperature: Array | float,
    vocab_size: int,
    mesh: Mesh | None,
    divergence: Divergence = "forward_kl",
    beta: Array | float = 0.5,
) -> Terms:
    """The same terms from the teacher's k most probable tokens and a bucket for all others.

    With teacher p over k + 1 buckets and student q, the forward KL is sum_m p_m (log p_m - log q_m), the student's mass
    in the bucket being the sum over its tokens, formed as a sum and not as 1 - the rest, which would cancel. Its
    gradient is T (q_v - p_v) at the k tokens and T (q_v - p_bucket q_v / q_bucket) at the others: the bucket's mass is
    taught, how the student shares it out is not. By the log-sum inequality it is at most the divergence over all
    tokens; with k = V it is that divergence.

    The same holds for the other divergences, over the same buckets. The gradient of the bucket's mass is shared out
    among its tokens in proportion to q_v, here too.
    """
    student = _below_largest(mask_padding(student_logits.astype(jnp.float32), vocab_size))
    soft_student, hard_student = jnp.exp(student / temperature), jnp.exp(student)
    soft_sum, hard_sum = _total(soft_student), _total(hard_student)
    soft_top, hard_top = _bucket_log_probs(top, top.soft_tail_BL, temperature), _bucket_log_probs(top, top.tail_BL, 1.0)
    at_top, teacher = _exchange_at(student, top.ids_BLM, jnp.exp(soft_top), mesh)
    is_other = teacher < 0.0

    def forward_kl(log_p: Array, log_q: Array, tail: Array, others: Array, whole: Array) -> Array:
        log_ratio = jnp.log(jnp.maximum(tail, _TINY)) - jnp.log(jnp.maximum(others, _TINY)) + jnp.log(whole)
        # A token of probability 0 has log_p = -inf, and 0 * -inf would be NaN.
        of_top = jnp.where(jnp.isneginf(log_p), 0.0, jnp.exp(log_p) * (log_p - log_q))
        return jnp.sum(of_top, axis=-1) + (tail * log_ratio)[..., 0]

    soft_tail, hard_tail = top.soft_tail_BL[..., None], top.tail_BL[..., None]
    soft_others, hard_others = (_total(jnp.where(is_other, x, 0.0)) for x in (soft_student, hard_student))
    kl_T1 = forward_kl(hard_top, at_top - jnp.log(hard_sum), hard_tail, hard_others, hard_sum)
    soft_log_q = at_top / temperature - jnp.log(soft_sum)
    if divergence == "forward_kl":
        soft = forward_kl(soft_top, soft_log_q, soft_tail, soft_others, soft_sum)
        shared_out = soft_student * (soft_tail / jnp.maximum(soft_others, _TINY))
        d_soft = temperature * (soft_student / soft_sum - jnp.where(is_other, shared_out, teacher))
    else:
        log_others = jnp.log(jnp.maximum(soft_others, _TINY)) - jnp.log(soft_sum)
        log_p = jnp.concatenate([soft_top, jnp.log(jnp.maximum(soft_tail, _TINY))], axis=-1)
        log_q = jnp.concatenate([soft_log_q, log_others], axis=-1)
        values, slopes = _mixture_terms(jnp.exp(log_p), jnp.exp(log_q), log_q, log_p - log_q, divergence, beta)
        soft = jnp.sum(values, axis=-1)
        _, at_ids = _exchange_at(student, top.ids_BLM, slopes[..., :-1], mesh)
        shared_out = soft_student * (slopes[..., -1:] / jnp.maximum(soft_others, _TINY))
        d_soft = jnp.where(is_other, shared_out, at_ids) - soft_student / soft_sum * _total(slopes)
        d_soft = temperature * d_soft
    hard, correct, d_hard = _label_terms(student, hard_student, hard_sum, labels)
    return Terms(within(temperature**2 * soft, 0.0), hard, within(kl_T1, 0.0), correct, d_soft, d_hard)


def _mixture_terms(
    p: Array, q: Array, log_q: Array, log_ratio: Array, divergence: Divergence, beta: Array | float
) -> tuple[Array, Array]:
    """Each token's share of D = a KL(p || m) + b KL(q || m), and h, of which D's gradient by the logits is made.

    With k = a (1 - s) - b s the shares are a p log(p / m) + b q log(q / m) - k (p - q). The last part, which sums to 0,
    makes each of them positive and of second order where p and q nearly agree; an error that all log p - log q have in
    common, as by rounding of the sums of exponentials, then does not reach the sum. And

        h = b q log(q / m) - k (p - q) (1 - s) q / m,   dD / dz = h - q sum(h),   z the logits over the temperature.

    All is formed from log p - log q and the larger one of p and q: m lies between the larger one times its share and
    the larger one, so that nothing overflows, and a probability that underflowed keeps its logarithm.

    Args:
      p, q, log_q: [..., V].
      log_ratio: log p - log q, [..., V]; -inf where p is 0.
    """
    of_teacher, of_student, share = _mixture(divergence, beta)
    k = of_teacher * (1.0 - share) - of_student * share
    log_ratio = jnp.maximum(log_ratio, jnp.minimum(math.log(_TINY) - log_q, 0.0))
    teacher_is_larger, gap = log_ratio >= 0.0, jnp.abs(log_ratio)
    larger, smaller = jnp.maximum(p, q), jnp.exp(-gap)  # the second, and all below, in units of the first
    p, q = jnp.where(teacher_is_larger, 1.0, smaller), jnp.where(teacher_is_larger, smaller, 1.0)
    k_difference = k * jnp.where(teacher_is_larger, -1.0, 1.0) * jnp.expm1(-gap)  # k (p - q)
    if divergence == "reverse_kl":  # m = p, and there is no KL(p || m)
        log_excess = -q * log_ratio
        return larger * (log_excess - k_difference), larger * log_excess
    share_of_larger = jnp.where(teacher_is_larger, share, 1.0 - share)
    near = jnp.log1p((1.0 - share_of_larger) * jnp.expm1(-jnp.minimum(gap, 1.0)))
    far = jnp.log(jnp.maximum(share_of_larger + (1.0 - share_of_larger) * smaller, _TINY))
    log_m = jnp.where(share_of_larger == 0.0, -gap, jnp.where(gap < 1.0, near, far))
    share_p = of_teacher * p * (jnp.minimum(log_ratio, 0.0) - log_m)
    share_q = of_student * q * (jnp.minimum(-log_ratio, 0.0) - log_m)
    students_part = jax.nn.sigmoid(jnp.log1p(-share) - jnp.log(share) - log_ratio)  # (1 - s) q / m
    return larger * (share_p + share_q - k_difference), larger * (share_q - k_difference * students_part)


def _mixture(divergence: Divergence, beta: Array | float) -> tuple[Array | float, Array | float, Array | float]:
    """The numbers a, b and s of a divergence."""
    if divergence == "reverse_kl":
        return 0.0, 1.0, 1.0
    if divergence == "skewed_kl":
        return 1.0, 0.0, beta
    if divergence == "skewed_reverse_kl":
        return 0.0, 1.0, 1.0 - beta
    of_teacher = jnp.where(beta == 0.0, 1.0, jnp.where(beta == 1.0, 0.0, beta))
    return of_teacher, 1.0 - of_teacher, beta


def _bucket_log_probs(top: TopK, tail_BL: Array, temperature: Array | float) -> Array:
    """Log-probabilities of the k tokens at a temperature, given the mass that it leaves to the others."""
    log_probs = jax.nn.log_softmax(top.log_probs_BLM.astype(jnp.float32) / temperature)
    return log_probs + jnp.log1p(-tail_BL)[..., None]


def _exchange_at(student_BLV: Array, ids_BLM: Array, values_BLM: Array, mesh: Mesh | None) -> tuple[Array, Array]:
    """The student's logits at the ids, [B, L, M], and the values given there, spread over V, -1 elsewhere.

    Where the vocabulary is sharded every device reads and writes its own part, and the k logits, not all of them, are
    summed over devices.
    """

    def local(student: Array, ids: Array, values: Array, first: Array | int = 0) -> tuple[Array, Array]:
        ids = ids - first
        is_local = (ids >= 0) & (ids < student.shape[-1])
        logits_at_ids = jnp.take_along_axis(student, jnp.where(is_local, ids, 0), axis=-1)
        rows, columns = (jnp.arange(n) for n in ids.shape[:2])
        places = (rows[:, None, None], columns[None, :, None], jnp.where(is_local, ids, student.shape[-1]))
        spread = jnp.full(student.shape, -1.0).at[places].set(values, mode="drop")
        return jnp.where(is_local, logits_at_ids, 0.0), spread

    if mesh is None:
        return local(student_BLV, ids_BLM, values_BLM)

    def on_device(student: Array, ids: Array, values: Array) -> tuple[Array, Array]:
        if student.shape[-1] == student_BLV.shape[-1]:
            return local(student, ids, values)
        logits_at_ids, spread = local(student, ids, values, jax.lax.axis_index("tensor") * student.shape[-1])
        return jax.lax.psum(logits_at_ids, "tensor"), spread

    vocabulary = mesh_spec(student_BLV.shape, (ROW_AXES, None, "tensor"), mesh)
    rows = mesh_spec(ids_BLM.shape, (ROW_AXES, None, None), mesh)
    exchange = jax.shard_map(on_device, mesh=mesh, in_specs=(vocabulary, rows, rows), out_specs=(rows, vocabulary))
    return exchange(student_BLV, ids_BLM, values_BLM)


def _label_terms(student: Array, exps: Array, total: Array, labels: Array) -> tuple[Array, Array, Array]:
    """Cross-entropy with the labels, whether the label's logit is the largest, and the first one's gradient.

    Args:
      student: float32 [..., V], logits less their largest; `exps` their exponentials, `total` the sum of those.
    """
    # As a comparison: indexing into a sharded vocabulary would gather it.
    is_label = jnp.arange(student.shape[-1]) == labels[..., None]
    at_label = _total(jnp.where(is_label, student, 0.0))
    correct = (at_label >= 0.0).astype(jnp.float32)
    return (jnp.log(total) - at_label)[..., 0], correct[..., 0], exps / total - is_label


def _total(x: Array) -> Array:
    return jnp.sum(x, axis=-1, keepdims=True)


def _below_largest(logits: Array) -> Array:
    """Logits less the largest of each token, so that no exponential overflows; no softmax depends on it.

    At least -1e30, so that differences between two models' logits do not overflow either.
    """
    return jnp.maximum(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)), -1e30)


def mask_padding(logits: Array, vocab_size: int) -> Array:
    """The logits with -1e30 for the vocabulary's padding, the entries from `vocab_size` on."""
    if logits.shape[-1] == vocab_size:
        return logits
    # A large finite number instead of -inf: p * (log p - log q) at p = 0 would be 0 * (-inf + inf).
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -1e30)
