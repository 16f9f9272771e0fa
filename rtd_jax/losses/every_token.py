"""Matching hidden states at every token: what Reasoning Trace Distillation is compared with.

Two terms, both sums over tokens divided by a count over the *global* batch, like those of `objective`:

    token alignment = mean over completion tokens of  1 - cos(f(h^S), h^T)
    intermediate    = mean over layer pairs and tokens of  |W_p h^S - h^T|^2 / |h^T|^2

The first asks whether RTD needs the *steps*, or any matching of states. The second is intermediate-layer distillation
with learned regressors W_p, one per pair of layers (Romero et al. 2015, "FitNets", equation 3). FitNets' squared error
is divided by the target's own square: a Llama has states a thousand times longer than the others at a few tokens, and
without the division those alone would be fitted.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rtd_jax.base.means import Mean, masked_sum, safe_divide
from rtd_jax.base.types import Array, Batch
from rtd_jax.losses.trajectory import Projection, boundary_losses


class TokenCounts(NamedTuple):
    """What the terms are averaged over, counted over the global batch; float32 scalars."""

    completion: Array  # tokens of completions
    chains: Array  # tokens of chains, prompts included


def token_counts(batch: Batch) -> TokenCounts:
    """Call it on the global batch, before any split."""
    completion_BL, chains_BL = token_masks(batch)
    return TokenCounts(*(jnp.sum(mask).astype(jnp.float32) for mask in (completion_BL, chains_BL)))


def token_masks(batch: Batch) -> tuple[Array, Array]:
    """Which tokens take part: those of completions, and those of chains with their prompts; bool [B, L] both."""
    return batch.loss_weights_BL > 0, batch.chain_ids_BL > 0


def hint_losses(student_BLS: Array, teacher_BLD: Array, mask_BL: Array, regressor_SD: Array) -> Array:
    """|W h_S - h_T|^2 / |h_T|^2 per token, float32 [B, L]; 0 with zero gradient where masked or where h_T is 0."""
    student = jnp.where(mask_BL[..., None], student_BLS, 0).astype(jnp.float32)
    teacher = jax.lax.stop_gradient(jnp.where(mask_BL[..., None], teacher_BLD, 0).astype(jnp.float32))
    error_BL = jnp.sum(jnp.square(jnp.einsum("bls,sd->bld", student, regressor_SD) - teacher), axis=-1)
    return safe_divide(error_BL, jnp.sum(jnp.square(teacher), axis=-1))


def token_alignment(
    student_BLS: Array, teacher_BLD: Array, batch: Batch, f: Projection, counts: TokenCounts
) -> tuple[Array, Mean]:
    """Token alignment of the rows given, over the global batch's count: (float32 scalar, metric as (sum, count))."""
    mask_BL, _ = token_masks(batch)
    total = jnp.sum(boundary_losses(student_BLS, teacher_BLD, mask_BL, f))
    return safe_divide(total, counts.completion), Mean(total, jnp.sum(mask_BL).astype(jnp.float32))


def intermediate(
    student_states: Sequence[Array],
    teacher_states: Sequence[Array],
    batch: Batch,
    regressors_PSD: Array,
    counts: TokenCounts,
) -> tuple[Array, Mean]:
    """The intermediate term over P layer pairs: (float32 scalar, metric as (sum, count)).

    Args:
      student_states: P arrays [B, L, S], one per pair.
      teacher_states: P arrays [B, L, D].
      batch: the rows (all of the batch, or a micro-batch).
      regressors_PSD: one learned map per pair.
      counts: `token_counts` of the global batch.
    """
    _, mask_BL = token_masks(batch)
    pairs = len(regressors_PSD)
    total = sum(
        masked_sum(hint_losses(student, teacher, mask_BL, regressor), mask_BL)
        for student, teacher, regressor in zip(student_states, teacher_states, regressors_PSD, strict=True)
    )
    share = jnp.asarray(total, jnp.float32) / pairs
    return safe_divide(share, counts.chains), Mean(share, jnp.sum(mask_BL).astype(jnp.float32))
