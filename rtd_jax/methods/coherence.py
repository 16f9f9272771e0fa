"""Reasoning coherence: the student's transitions between steps are to take the teacher's direction.

It is also the yardstick of the curriculum: a stage ends when its value on validation chains is as low as the teacher's
own under another context.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from rtd_jax.base.boundaries import transition_boundaries
from rtd_jax.base.means import Mean, Metrics
from rtd_jax.base.settings import check_ranges
from rtd_jax.base.types import Array, Batch, Params
from rtd_jax.losses.trajectory import coherence_sums, count_chains, transition_mask
from rtd_jax.methods.maps import (
    TrajectorySettings,
    TrajectoryTerm,
    init_transition_map,
    map_axes,
    matched,
    transition_map,
)
from rtd_jax.methods.term import Coefficients, Outputs, Setup, Term


@dataclass(frozen=True)
class CoherenceSettings(TrajectorySettings):
    """Keys of `loss` that the coherence reads."""

    teaches_by: ClassVar[str] = "coherence_weight"

    coherence_weight: float = 0.5  # of the reasoning coherence
    anchor_prompt: bool = True  # the prompt's end is h_0, so that a one-step problem has a transition

    def __post_init__(self) -> None:
        check_ranges(self, coherence_weight="[0, 1e6]")

    def terms(self, setup: Setup) -> tuple[Term, ...]:
        layers = self.matched_layers(setup)
        form = self.projections, self.step_state, self.distance, self.anchor_prompt
        return (Coherence(self.coherence_weight, layers, *form),)


@dataclass(frozen=True)
class Coherence(TrajectoryTerm):
    """Mean over a chain's transitions and pairs of layers of (1 - cos(g(delta_S), delta_T))^2, summed over chains."""

    anchor_prompt: bool = True

    name: ClassVar[str] = "coherence"
    setting: ClassVar[str] = "loss.coherence_weight"

    def init_params(self, key: Array, student_width: int, teacher_width: int, kept_S: Array | None = None) -> Params:
        return init_transition_map(key, self.maps, self.layers, student_width, teacher_width, kept_S)

    def param_axes(self) -> dict[str, tuple[str, ...]]:
        return {} if self.maps == "none" else {"f" if self.maps == "shared" else "g": map_axes(self.layers)}

    def denominator(self, batch: Batch) -> Array:
        return count_chains(transition_mask(self._boundaries(batch)))

    def sums(self, outputs: Outputs, params: Params, coefficients: Coefficients) -> tuple[Array, Metrics]:
        mask_BCK = self._boundaries(outputs.batch)
        states = outputs.student.boundary_states, outputs.teacher.boundary_states
        total = jnp.zeros(())
        for student, teacher, g in matched(*states, self.layers, transition_map(params)):
            total += coherence_sums(student, teacher, mask_BCK, g, self.distance).sum
        share = total / len(self.layers)
        return share, {"distill/coherence": Mean(share, count_chains(transition_mask(mask_BCK)))}

    def _boundaries(self, batch: Batch) -> Array:
        return transition_boundaries(batch.boundary_mask_BCK, self.anchor_prompt)
