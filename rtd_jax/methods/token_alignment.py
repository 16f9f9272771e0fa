"""A control: alignment at every token of a completion. Does RTD need the steps, or any matching of states?"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from rtd_jax.base.boundaries import completion_tokens
from rtd_jax.base.means import Mean, Metrics
from rtd_jax.base.settings import check_ranges
from rtd_jax.base.types import Array, Batch, Params
from rtd_jax.losses.trajectory import boundary_losses
from rtd_jax.methods.maps import AXES, Maps, TrajectorySettings, init_state_map, state_map
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
        return (TokenAlignment(self.token_alignment_weight, self.matched_layers(setup), self.projections),)


@dataclass(frozen=True)
class TokenAlignment(Term):
    """1 - cos(f(h_S), h_T), summed over the tokens of completions."""

    layers: tuple[int, int]  # (student's, teacher's)
    maps: Maps = "separate"

    name: ClassVar[str] = "token_alignment"
    setting: ClassVar[str] = "loss.token_alignment_weight"

    @property
    def reads(self) -> Reads:
        student, teacher = self.layers
        return Reads(student_tokens=(student,), teacher_tokens=(teacher,))

    def init_params(self, key: Array, student_width: int, teacher_width: int) -> Params:
        return init_state_map(key, self.maps, student_width, teacher_width)

    def param_axes(self) -> dict[str, tuple[str, ...]]:
        return {} if self.maps == "none" else {"f": AXES}

    def denominator(self, batch: Batch) -> Array:
        return jnp.sum(completion_tokens(batch)).astype(jnp.float32)

    def sums(self, outputs: Outputs, params: Params, coefficients: Coefficients) -> tuple[Array, Metrics]:
        student, teacher, batch = outputs
        states = student.token_states[self.layers[0]], teacher.token_states[self.layers[1]]
        mask_BL = completion_tokens(batch)
        total = jnp.sum(boundary_losses(*states, mask_BL, state_map(params)))
        return total, {"distill/token_alignment": Mean(total, jnp.sum(mask_BL).astype(jnp.float32))}
