"""Step-boundary alignment: the student's states of steps are to point where the teacher's do."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from rtd_jax.base.boundaries import step_boundaries
from rtd_jax.base.means import Mean, Metrics
from rtd_jax.base.settings import check_ranges
from rtd_jax.base.types import Array, Batch, Params
from rtd_jax.losses.trajectory import alignment_sums, count_chains
from rtd_jax.methods.maps import (
    TrajectorySettings,
    TrajectoryTerm,
    init_state_map,
    map_axes,
    matched,
    state_map,
)
from rtd_jax.methods.term import Coefficients, Outputs, Setup, Term


@dataclass(frozen=True)
class AlignmentSettings(TrajectorySettings):
    """Keys of `loss` that the alignment reads."""

    teaches_by: ClassVar[str] = "alignment_weight"

    alignment_weight: float = 0.3  # of the boundary alignment

    def __post_init__(self) -> None:
        check_ranges(self, alignment_weight="[0, 1e6]")

    def terms(self, setup: Setup) -> tuple[Term, ...]:
        layers = self.matched_layers(setup)
        return (Alignment(self.alignment_weight, layers, self.projections, self.step_state, self.distance),)


@dataclass(frozen=True)
class Alignment(TrajectoryTerm):
    """Mean over a chain's steps and pairs of layers of 1 - cos(f(h_S), h_T), summed over chains."""

    name: ClassVar[str] = "alignment"
    setting: ClassVar[str] = "loss.alignment_weight"

    def init_params(self, key: Array, student_width: int, teacher_width: int, kept_S: Array | None = None) -> Params:
        return init_state_map(key, self.maps, self.layers, student_width, teacher_width, kept_S)

    def param_axes(self) -> dict[str, tuple[str, ...]]:
        return {} if self.maps == "none" else {"f": map_axes(self.layers)}

    def denominator(self, batch: Batch) -> Array:
        return count_chains(step_boundaries(batch.boundary_mask_BCK))

    def sums(self, outputs: Outputs, params: Params, coefficients: Coefficients) -> tuple[Array, Metrics]:
        mask_BCK = step_boundaries(outputs.batch.boundary_mask_BCK)
        states = outputs.student.boundary_states, outputs.teacher.boundary_states
        total = jnp.zeros(())
        for student, teacher, f in matched(*states, self.layers, state_map(params)):
            total += alignment_sums(student, teacher, mask_BCK, f, self.distance).sum
        share = total / len(self.layers)
        return share, {"distill/alignment": Mean(share, count_chains(mask_BCK))}
