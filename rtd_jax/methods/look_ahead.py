"""Look-ahead: from where a step begins, the student is to know where the teacher will be when it is done.

The other terms compare states of one place, at which the student has read the step that it is asked about: reading may
be enough (docs/coherence.md). Here a linear head predicts the teacher's state of step i from the student's state at the
last token before the step, so the student has to work the step out, or to know that it cannot.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from rtd_jax.base.boundaries import gather_boundaries
from rtd_jax.base.means import Mean, Metrics, mean_per_chain
from rtd_jax.base.settings import check_ranges
from rtd_jax.base.types import Array, Batch, Params
from rtd_jax.losses.trajectory import boundary_losses, count_chains, transition_mask
from rtd_jax.methods.maps import TrajectorySettings, TrajectoryTerm, init_maps, layers_of, map_axes, matched
from rtd_jax.methods.term import Coefficients, Outputs, Reads, Setup, Term


@dataclass(frozen=True)
class LookAheadSettings(TrajectorySettings):
    """Keys of `loss` that the look-ahead reads."""

    teaches_by: ClassVar[str] = "look_ahead_weight"

    look_ahead_weight: float = 0.0  # of the prediction of a step's state from where the step begins

    def __post_init__(self) -> None:
        check_ranges(self, look_ahead_weight="[0, 1e6]")

    def terms(self, setup: Setup) -> tuple[Term, ...]:
        if not self.look_ahead_weight:
            return ()
        form = self.matched_layers(setup), self.projections, self.step_state, self.distance
        return (LookAhead(self.look_ahead_weight, *form),)


@dataclass(frozen=True)
class LookAhead(TrajectoryTerm):
    """Mean over a chain's steps and pairs of layers of 1 - cos(W h_S, h_T), summed over chains.

    h_S is the student's state at the last token before the step, the prompt's end for the first one, and h_T the
    teacher's state of the step (`step_state`). The head W is the entry "ahead" of the params, [S, D], or [P, S, D] for
    several pairs of layers; `projections` does not concern it.
    """

    name: ClassVar[str] = "look_ahead"
    setting: ClassVar[str] = "loss.look_ahead_weight"

    @property
    def reads(self) -> Reads:
        students, teachers = map(layers_of, zip(*self.layers, strict=True))
        return Reads(student_tokens=students, teacher_boundaries=teachers, step_state=self.step_state)

    def init_params(self, key: Array, student_width: int, teacher_width: int, kept_S: Array | None = None) -> Params:
        return {"ahead": init_maps(jax.random.fold_in(key, 2), self.layers, student_width, teacher_width, kept_S)}

    def param_axes(self) -> dict[str, tuple[str, ...]]:
        return {"ahead": map_axes(self.layers)}

    def denominator(self, batch: Batch) -> Array:
        return count_chains(transition_mask(batch.boundary_mask_BCK))

    def sums(self, outputs: Outputs, params: Params, coefficients: Coefficients) -> tuple[Array, Metrics]:
        student, teacher, batch = outputs
        mask_BCJ = transition_mask(batch.boundary_mask_BCK)
        before = batch.boundary_positions_BCK[..., :-1]
        total = jnp.zeros(())
        for tokens, states, head in matched(
            student.token_states, teacher.boundary_states, self.layers, params["ahead"]
        ):
            begins_BCJS = gather_boundaries(tokens, before)
            losses = boundary_losses(begins_BCJS, states[..., 1:, :], mask_BCJ, head, self.distance)
            total += jnp.sum(mean_per_chain(losses, mask_BCJ))
        share = total / len(self.layers)
        return share, {"distill/look_ahead": Mean(share, count_chains(mask_BCJ))}
