"""Step-boundary alignment: the student's states at the ends of steps are to point where the teacher's do."""

from dataclasses import dataclass
from typing import ClassVar

from rtd_jax.base.boundaries import step_boundaries
from rtd_jax.base.means import Metrics
from rtd_jax.base.settings import check_ranges
from rtd_jax.base.types import Array, Batch, Params
from rtd_jax.losses.trajectory import alignment_sums, count_chains
from rtd_jax.methods.maps import AXES, Maps, TrajectorySettings, boundary_reads, init_state_map, state_map
from rtd_jax.methods.term import Coefficients, Outputs, Reads, Setup, Term


@dataclass(frozen=True)
class AlignmentSettings(TrajectorySettings):
    """Keys of `loss` that the alignment reads."""

    teaches_by: ClassVar[str] = "alignment_weight"

    alignment_weight: float = 0.3  # of the boundary alignment

    def __post_init__(self) -> None:
        check_ranges(self, alignment_weight="[0, 1e6]")

    def terms(self, setup: Setup) -> tuple[Term, ...]:
        return (Alignment(self.alignment_weight, self.matched_layers(setup), self.projections),)


@dataclass(frozen=True)
class Alignment(Term):
    """Mean over a chain's step boundaries of 1 - cos(f(h_S), h_T), summed over chains."""

    layers: tuple[int, int]  # (student's, teacher's)
    maps: Maps = "separate"

    name: ClassVar[str] = "alignment"
    setting: ClassVar[str] = "loss.alignment_weight"

    @property
    def reads(self) -> Reads:
        return boundary_reads(self.layers)

    def init_params(self, key: Array, student_width: int, teacher_width: int) -> Params:
        return init_state_map(key, self.maps, student_width, teacher_width)

    def param_axes(self) -> dict[str, tuple[str, ...]]:
        return {} if self.maps == "none" else {"f": AXES}

    def denominator(self, batch: Batch) -> Array:
        return count_chains(step_boundaries(batch.boundary_mask_BCK))

    def sums(self, outputs: Outputs, params: Params, coefficients: Coefficients) -> tuple[Array, Metrics]:
        student, teacher, batch = outputs
        mean = alignment_sums(
            student.boundary_states[self.layers[0]],
            teacher.boundary_states[self.layers[1]],
            step_boundaries(batch.boundary_mask_BCK),
            state_map(params),
        )
        return mean.sum, {"distill/alignment": mean}
