"""Reasoning coherence: the student's transitions between steps are to take the teacher's direction.

It is also the yardstick of the curriculum: a stage ends when its value on validation chains is as low as the teacher's
own under another context.
"""

from dataclasses import dataclass
from typing import ClassVar

from rtd_jax.base.boundaries import transition_boundaries
from rtd_jax.base.means import Metrics
from rtd_jax.base.settings import check_ranges
from rtd_jax.base.types import Array, Batch, Params
from rtd_jax.losses.trajectory import TransitionForm, coherence_sums, count_chains, transition_mask
from rtd_jax.methods.maps import AXES, Maps, TrajectorySettings, boundary_reads, init_transition_map, transition_map
from rtd_jax.methods.term import Coefficients, Outputs, Reads, Setup, Term


@dataclass(frozen=True)
class CoherenceSettings(TrajectorySettings):
    """Keys of `loss` that the coherence reads."""

    teaches_by: ClassVar[str] = "coherence_weight"

    coherence_weight: float = 0.5  # of the reasoning coherence
    anchor_prompt: bool = True  # the prompt's end is h_0, so that a one-step problem has a transition
    transition_form: TransitionForm = "direction"  # the article's cosine; difference: lengths of transitions count too

    def __post_init__(self) -> None:
        check_ranges(self, coherence_weight="[0, 1e6]")

    def terms(self, setup: Setup) -> tuple[Term, ...]:
        layers = self.matched_layers(setup)
        return (Coherence(self.coherence_weight, layers, self.projections, self.anchor_prompt, self.transition_form),)


@dataclass(frozen=True)
class Coherence(Term):
    """Mean over a chain's transitions of (1 - cos(g(delta_S), delta_T))^2, summed over chains."""

    layers: tuple[int, int]  # (student's, teacher's)
    maps: Maps = "separate"
    anchor_prompt: bool = True
    form: TransitionForm = "direction"

    name: ClassVar[str] = "coherence"
    setting: ClassVar[str] = "loss.coherence_weight"

    @property
    def reads(self) -> Reads:
        return boundary_reads(self.layers)

    def init_params(self, key: Array, student_width: int, teacher_width: int) -> Params:
        return init_transition_map(key, self.maps, student_width, teacher_width)

    def param_axes(self) -> dict[str, tuple[str, ...]]:
        return {} if self.maps == "none" else {"f" if self.maps == "shared" else "g": AXES}

    def denominator(self, batch: Batch) -> Array:
        return count_chains(transition_mask(self._boundaries(batch)))

    def sums(self, outputs: Outputs, params: Params, coefficients: Coefficients) -> tuple[Array, Metrics]:
        student, teacher, batch = outputs
        mean = coherence_sums(
            student.boundary_states[self.layers[0]],
            teacher.boundary_states[self.layers[1]],
            self._boundaries(batch),
            transition_map(params),
            self.form,
        )
        return mean.sum, {"distill/coherence": mean}

    def _boundaries(self, batch: Batch) -> Array:
        return transition_boundaries(batch.boundary_mask_BCK, self.anchor_prompt)
