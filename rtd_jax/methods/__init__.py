"""What a student learns from. A method is a file here: its keys of `loss`, and the term that they stand for.

To add one, write such a file and name its settings among the bases of `LossSettings`.
"""

from dataclasses import dataclass, replace
from typing import cast

from rtd_jax.methods.alignment import AlignmentSettings
from rtd_jax.methods.coherence import CoherenceSettings
from rtd_jax.methods.intermediate import IntermediateSettings
from rtd_jax.methods.kd import KDSettings, Labels
from rtd_jax.methods.look_ahead import LookAheadSettings
from rtd_jax.methods.step_reward import StepRewardSettings
from rtd_jax.methods.term import MethodSettings, Objective, Setup, Term
from rtd_jax.methods.token_alignment import TokenAlignmentSettings


@dataclass(frozen=True)
class LossSettings(
    KDSettings,
    AlignmentSettings,
    CoherenceSettings,
    LookAheadSettings,
    TokenAlignmentSettings,
    IntermediateSettings,
    StepRewardSettings,
):
    """L = alpha T^2 KL + (1 - alpha) CE + alignment_weight L_align + coherence_weight L_coherence, and its rivals.

    With alpha and all weights 0 the teacher is not run: fine-tuning on chains of thought.
    """

    def __post_init__(self) -> None:
        for part in LossSettings.__mro__[1:]:  # each checks its own keys
            if check := vars(part).get("__post_init__"):
                check(self)

    def unread_settings(self) -> dict[str, str]:
        """Keys of any method that are not read because of others, and why."""
        return {key: why for method in _methods() for key, why in method.unread_settings(self).items()}

    def teaches(self) -> bool:
        """Whether the loss on the data's chains has anything of the teacher in it."""
        return any(getattr(self, method.teaches_by) for method in _methods() if method.teaches_by)

    def reading_states(self) -> list[str]:
        """The keys, not 0, that put hidden states of the teacher into the loss."""
        keys = [method.teaches_by for method in _methods() if method.reads_states and method.teaches_by]
        return [key for key in keys if getattr(self, key)]

    def terms(self, setup: Setup) -> tuple[Term, ...]:
        """The terms of all methods."""
        return tuple(term for method in _methods() for term in method.terms(self, setup))

    def objective(self, setup: Setup) -> Objective:
        """The sum of the terms, with coherence as the yardstick of stages, whatever its weight.

        Where nothing teaches, the labels take the place of what reads the teacher. Without the teacher's states there
        is no yardstick, and the terms that would only measure them are dormant. With a share of own chains the terms
        that read the teacher are there a second time, about those (`OnPolicySettings`).
        """
        terms, share = self.terms(setup), setup.on_policy.fraction
        (yardstick,) = CoherenceSettings.terms(self, setup)
        if self.teaches() and share:
            own = tuple(term.on_own_chains(share) for term in terms if term.reads.teacher)
            of_data = tuple(replace(term, weight=(1.0 - share) * term.weight) for term in terms) if share < 1.0 else ()
            return Objective((*of_data, *own), yardstick)
        if self.teaches() and setup.teacher_states:
            return Objective(terms, yardstick)
        if self.teaches():
            blind = tuple(term for term in terms if term.reads.teacher_states)
            return Objective(tuple(term for term in terms if term not in blind), None, blind)
        labels = Labels(1.0, setup.vocab_size, self.chunk_length, setup.mesh)
        awake = (labels, *(term for term in terms if not term.reads.teacher))
        return Objective(awake, yardstick, tuple(term for term in terms if term.reads.teacher))


def _methods() -> tuple[type[MethodSettings], ...]:
    return cast(tuple[type[MethodSettings], ...], LossSettings.__bases__)
