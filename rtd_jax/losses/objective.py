"""The published objective in one call, L_RTD = L_KD + 0.3 * L_align + 0.5 * L_coherence, for other people's trainers.

Each part is a sum divided by a denominator counted over the *global* batch (`denominators`), so that adding the
gradients of micro-batches, or of devices, gives the gradient of the batch whatever the split. The trainer here sums the
terms of `rtd_jax.methods` instead, which call the same losses.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from rtd_jax.base.boundaries import shifted_labels, step_boundaries, transition_boundaries
from rtd_jax.base.means import Mean, Metrics, safe_divide
from rtd_jax.base.types import Array, Batch, TeacherOutputs
from rtd_jax.losses.checks import check_number
from rtd_jax.losses.kd import kd_sums, top_k_kd_sums
from rtd_jax.losses.trajectory import (
    Distance,
    Projection,
    alignment_sums,
    coherence_sums,
    count_chains,
    transition_mask,
)


class LossWeights(NamedTuple):
    """Coefficients of the objective. Traced, so that changing one does not recompile. Defaults: the article's."""

    temperature: Array | float = 4.0
    alpha: Array | float = 0.7  # weight of the soft loss; the labels' cross-entropy gets 1 - alpha
    alignment: Array | float = 0.3
    coherence: Array | float = 0.5


class Denominators(NamedTuple):
    """What each term is averaged over, counted over the global batch; float32 scalars."""

    tokens: Array  # sum of loss weights
    aligned_chains: Array  # chains with at least one step boundary
    coherent_chains: Array  # chains with at least one transition


class Projections(NamedTuple):
    """The learned maps from student width to teacher width, [S, D] each: f for states, g for transitions."""

    f: Projection = None
    g: Projection = None


def denominators(batch: Batch, *, anchor_prompt: bool = True) -> Denominators:
    """Counts what the terms are averaged over. Call it on the global batch, before any split."""
    _, weights_BL = shifted_labels(batch)
    aligned = step_boundaries(batch.boundary_mask_BCK)
    coherent = transition_mask(transition_boundaries(batch.boundary_mask_BCK, anchor_prompt))
    return Denominators(
        tokens=jnp.sum(weights_BL),
        aligned_chains=count_chains(aligned),
        coherent_chains=count_chains(coherent),
    )


def rtd(
    student_hidden_BLS: Array,
    student_boundary_states_BCKS: Array,
    student_head_SV: Array,
    teacher: TeacherOutputs,
    teacher_head_DV: Array | None,
    batch: Batch,
    *,
    projections: Projections,
    weights: LossWeights,
    totals: Denominators,
    vocab_size: int,
    anchor_prompt: bool = True,
    distance: Distance = "cosine",
    chunk_length: int = 32,
    mesh: Mesh | None = None,
) -> tuple[Array, Metrics]:
    """L_KD + w_a * L_align + w_c * L_coherence of the rows given, each over the global batch's denominators.

    Args:
      student_hidden_BLS: states that the student's head reads.
      student_boundary_states_BCKS: the student's states at the boundaries (of the layer that is matched).
      student_head_SV, teacher_head_DV: LM heads; the teacher's is not read (None) with cached predictions.
      teacher: its outputs on the same batch, online or cached, with the states of one layer at the boundaries; no
        gradient flows into them.
      batch: the rows (all of the batch, or a micro-batch).
      projections: f and g.
      weights: coefficients.
      totals: `denominators` of the global batch.
      vocab_size: real vocabulary entries.
      anchor_prompt: whether the prompt's end is h_0 (see `transition_boundaries`).
      distance: see `boundary_losses` and `transition_losses`.
      chunk_length, mesh: see `kd_sums`.

    Returns:
      The loss (float32 scalar; sums over a partition of the rows to the batch's loss), and the metrics as (sum, count).

    Raises:
      ValueError: a plain weight is negative or not finite, and what `kd_sums` and the trajectory losses raise.
    """
    check_number("weights.alignment", weights.alignment, 0.0)
    check_number("weights.coherence", weights.coherence, 0.0)
    labels_BL, loss_weights_BL = shifted_labels(batch)
    student = student_hidden_BLS, student_head_SV
    targets = labels_BL, loss_weights_BL
    options: Any = {"temperature": weights.temperature, "alpha": weights.alpha, "vocab_size": vocab_size}
    options |= {"chunk_length": chunk_length, "mesh": mesh}
    if teacher.top_k is not None:
        kd = top_k_kd_sums(*student, teacher.top_k, *targets, **options)
    else:
        assert teacher.hidden_BLD is not None, "the teacher's outputs have neither states nor cached predictions"
        assert teacher_head_DV is not None
        kd = kd_sums(*student, teacher.hidden_BLD, teacher_head_DV, *targets, **options)
    (teacher_states_BCKD,) = teacher.boundary_states.values()
    states = student_boundary_states_BCKS, teacher_states_BCKD
    align = alignment_sums(*states, step_boundaries(batch.boundary_mask_BCK), projections.f, distance)
    path = transition_boundaries(batch.boundary_mask_BCK, anchor_prompt)
    cohere = coherence_sums(*states, path, projections.g, distance)
    loss = (
        safe_divide(kd.loss, totals.tokens)
        + weights.alignment * safe_divide(align.sum, totals.aligned_chains)
        + weights.coherence * safe_divide(cohere.sum, totals.coherent_chains)
    )
    metrics = {
        "distill/soft_loss": Mean(kd.soft, kd.weight),
        "distill/hard_loss": Mean(kd.hard, kd.weight),
        "distill/kl_div_T1": Mean(kd.kl_T1, kd.weight),
        "distill/token_accuracy": Mean(kd.correct, kd.weight),
        "distill/alignment": align,
        "distill/coherence": cohere,
        "loss": Mean(loss, jnp.ones(())),  # a sum over micro-batches; the step sets the count back to one per update
    }
    return loss, metrics
