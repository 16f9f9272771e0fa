"""A control: alignment at every token of a completion. Does RTD need the steps, or any matching of states?"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from rtd_jax.base.boundaries import completion_tokens
from rtd_jax.base.means import Mean, Metrics
from rtd_jax.base.settings import check_ranges
from rtd_jax.base.types import Array, Batch, Params
from rtd_jax.losses.trajectory import boundary_losses
from rtd_jax.methods.maps import (
    TrajectorySettings,
    TrajectoryTerm,
    init_state_map,
    layers_of,
    map_axes,
    matched,
    state_map,
)
from rtd_jax.methods.term import Coefficients, Outputs, Reads, Setup, Term


@dataclass(frozen=True)
class TokenAlignmentSettings(TrajectorySettings):
    """Keys of `loss` that the token alignment reads."""

    teaches_by: ClassVar[str] = "token_alignment_weight"

    token_alignment_weight: float = 0.0  # a control: alignment at every token of a completion

    def __post_init__(self) -> None:
        check_ranges(self, token_alignment_weight="[0, 1e6]")

    def terms(self, setup: Setup) -> tuple[Term, ...]:
        if not self.token_alignment_weight:
            return ()
        layers = self.matched_layers(setup)
        form = self.projections, self.step_state, self.distance
        return (TokenAlignment(self.token_alignment_weight, layers, *form),)


@dataclass(frozen=True)
class TokenAlignment(TrajectoryTerm):
    """1 - cos(f(h_S), h_T), averaged over pairs of layers and summed over the tokens of completions."""

    name: ClassVar[str] = "token_alignment"
    setting: ClassVar[str] = "loss.token_alignment_weight"

    @property
    def reads(self) -> Reads:
        students, teachers = map(layers_of, zip(*self.layers, strict=True))
        return Reads(student_tokens=students, teacher_tokens=teachers)

    def init_params(self, key: Array, student_width: int, teacher_width: int, kept_S: Array | None = None) -> Params:
        return init_state_map(key, self.maps, self.layers, student_width, teacher_width, kept_S)

    def param_axes(self) -> dict[str, tuple[str, ...]]:
        return {} if self.maps == "none" else {"f": map_axes(self.layers)}

    def denominator(self, batch: Batch) -> Array:
        return jnp.sum(completion_tokens(batch)).astype(jnp.float32)

    def sums(self, outputs: Outputs, params: Params, coefficients: Coefficients) -> tuple[Array, Metrics]:
        mask_BL = completion_tokens(outputs.batch)
        states = outputs.student.token_states, outputs.teacher.token_states
        total = jnp.zeros(())
        for student, teacher, f in matched(*states, self.layers, state_map(params)):
            total += jnp.sum(boundary_losses(student, teacher, mask_BL, f, self.distance))
        share = total / len(self.layers)
        return share, {"distill/token_alignment": Mean(share, jnp.sum(mask_BL).astype(jnp.float32))}
