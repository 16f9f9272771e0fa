"""A rival: intermediate layers matched at every token, by learned regressors.

Source: Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", arXiv:1412.6550, equation 3; here with several pairs of
evenly spaced layers, and each token's squared error relative to the target's square (`losses.hints`).
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from rtd_jax.base.boundaries import chain_tokens, completion_tokens
from rtd_jax.base.means import Mean, Metrics, masked_sum
from rtd_jax.base.settings import check_ranges
from rtd_jax.base.types import Array, Batch, Params
from rtd_jax.losses.hints import hint_losses
from rtd_jax.methods.maps import AXES, init_map
from rtd_jax.methods.term import Coefficients, MethodSettings, Outputs, Reads, Setup, Term
from rtd_jax.models.config import layers_to_match


@dataclass(frozen=True)
class IntermediateSettings(MethodSettings):
    """Keys of `loss` that the matching of intermediate layers reads."""

    teaches_by: ClassVar[str] = "intermediate_weight"
    reads_states: ClassVar[bool] = True

    intermediate_weight: float = 0.0  # a baseline: intermediate layers matched at every token
    intermediate_layers: int = 4  # pairs of evenly spaced layers; read when intermediate_weight is not 0
    intermediate_prompt: bool = True  # the tokens of prompts are matched too, not those of completions alone

    def __post_init__(self) -> None:
        check_ranges(self, intermediate_weight="[0, 1e6]", intermediate_layers="[1, 1000]")

    def unread_settings(self) -> dict[str, str]:
        names = () if self.intermediate_weight else ("intermediate_layers", "intermediate_prompt")
        return dict.fromkeys(names, "loss.intermediate_weight is 0")

    def terms(self, setup: Setup) -> tuple[Term, ...]:
        if not self.intermediate_weight:
            return ()
        count = self.intermediate_layers
        students, teachers = (layers_to_match(config.layers, count) for config in (setup.student, setup.teacher))
        pairs = tuple(zip(students, teachers, strict=True))
        return (Intermediate(self.intermediate_weight, pairs, self.intermediate_prompt),)


@dataclass(frozen=True)
class Intermediate(Term):
    """|W_p h_S - h_T|^2 / |h_T|^2, averaged over P pairs of layers and summed over the tokens of chains.

    The regressors W_p are the entry "regressors" of the params, [P, S, D].
    """

    pairs: tuple[tuple[int, int], ...]  # (student's, teacher's) layer
    prompt: bool = True  # whether the tokens of prompts take part

    name: ClassVar[str] = "intermediate"
    setting: ClassVar[str] = "loss.intermediate_weight"

    @property
    def reads(self) -> Reads:
        students, teachers = zip(*self.pairs, strict=True)
        return Reads(student_tokens=tuple(students), teacher_tokens=tuple(teachers))

    def init_params(self, key: Array, student_width: int, teacher_width: int, kept_S: Array | None = None) -> Params:
        keys = jax.random.split(jax.random.fold_in(key, 1), len(self.pairs))
        return {"regressors": jnp.stack([init_map(key, student_width, teacher_width, kept_S) for key in keys])}

    def param_axes(self) -> dict[str, tuple[str, ...]]:
        return {"regressors": ("layers", *AXES)}

    def denominator(self, batch: Batch) -> Array:
        return jnp.sum(self._tokens(batch)).astype(jnp.float32)

    def sums(self, outputs: Outputs, params: Params, coefficients: Coefficients) -> tuple[Array, Metrics]:
        student, teacher, batch = outputs
        mask_BL, total = self._tokens(batch), jnp.zeros(())
        # The regressors are iterated over: `regressors[i]` cannot be differentiated into `accumulate`'s references.
        for (of_student, of_teacher), regressor_SD in zip(self.pairs, params["regressors"], strict=True):
            states = student.token_states[of_student], teacher.token_states[of_teacher]
            total += masked_sum(hint_losses(*states, mask_BL, regressor_SD), mask_BL)
        share = total / len(self.pairs)
        return share, {"distill/intermediate": Mean(share, jnp.sum(mask_BL).astype(jnp.float32))}

    def _tokens(self, batch: Batch) -> Array:
        return chain_tokens(batch) if self.prompt else completion_tokens(batch)
