"""Chains that the student draws itself: how many, of which problems, and how long they serve."""

from dataclasses import dataclass
from typing import Literal

from rtd_jax.base.settings import SettingError, check_ranges

JUDGE = "judge"  # as `RewardSettings.model`


# Where the steps of a drawn chain end: with its lines, by the rules for prose, or by data.segmentation's classifier.
OwnSteps = Literal["lines", "prose", "classifier"]


@dataclass(frozen=True)
class OnPolicySettings:
    """On-policy distillation: the student's own chains in part of each update, read by the teacher in that update.

    Of an update's rows, `fraction` hold chains that the current student drew for training problems, and the loss is
    (1 - fraction) L_data + fraction L_own. L_own has the terms of the loss that read the teacher, each averaged over
    the drawn chains; there are no labels on them, so logit matching is the divergence alone. Source: Agarwal et al.
    2024, "On-Policy Distillation of Language Models", arXiv:2306.13649, algorithm 1, where an update takes drawn chains
    with probability `fraction`; here each update has its share.
    """

    fraction: float = 0.0  # of an update's rows that hold chains drawn by the student, and their share of the loss
    temperature: float = 1.0  # of the draws
    top_p: float = 1.0  # draws are from the most probable tokens that together have this probability; 1: from all
    updates_per_refresh: int = 1  # updates after which the student draws anew; a divisor of checkpoint_every
    max_new_tokens: int = 128  # of a drawn chain; one that is not finished keeps its tokens and has no end
    batch_size: int = 128  # chains drawn at one time
    steps: OwnSteps = (
        "lines"  # where steps of drawn chains end: lines, prose (rules), or data.segmentation's classifier
    )

    def __post_init__(self) -> None:
        counts = ("updates_per_refresh", "max_new_tokens", "batch_size")
        check_ranges(self, **dict.fromkeys(counts, "[1, 1e6]"), temperature="[0.001, 1e6]", top_p="(0, 1]")
        check_ranges(self, fraction="[0, 1]")

    def rows(self, batch_size: int) -> int:
        """Rows of drawn chains among an update's `batch_size` rows: the fraction, rounded, and at least one row of each
        kind that has a share of the loss.

        Raises:
          ValueError: the single row of an update cannot hold both kinds.
        """
        if self.fraction in (0.0, 1.0):
            return round(self.fraction) * batch_size
        if batch_size == 1:
            raise ValueError(
                f"on_policy.fraction is {self.fraction}, but an update's batch_size of 1 row cannot hold both kinds of "
                "chains; use a fraction of 0 or 1, or more rows"
            )
        return min(max(1, round(self.fraction * batch_size)), batch_size - 1)


@dataclass(frozen=True)
class RewardSettings:
    """How the student draws chains of its own and learns from their steps' rewards.

    Read when loss.reward_weight is not 0. Every `updates_per_refresh` updates, `samples` chains of each of `prompts`
    training problems are drawn and scored; each update takes `prompts_per_update` of these problems with all their
    chains, in turn.
    """

    model: str = ""  # "judge": the step judge by rules; else a folder of launch/reward_model.py (its <workdir>/model)
    prompts: int = 32  # training problems of a refresh
    samples: int = 4  # chains of each problem
    prompts_per_update: int = 8  # of these problems, with all their chains
    updates_per_refresh: int = 8  # a divisor of checkpoint_every
    temperature: float = 1.0  # of the draws, and of the policy whose ratios are clipped
    clip: float = 0.2  # by which a probability's ratio may leave 1 before its gradient stops
    max_new_tokens: int = 128  # of a drawn chain
    batch_size: int = 128  # chains drawn at one time

    def __post_init__(self) -> None:
        counts = ("prompts", "prompts_per_update", "updates_per_refresh", "max_new_tokens", "batch_size")
        check_ranges(self, **dict.fromkeys(counts, "[1, 1e6]"), temperature="[0.001, 1e6]", clip="(0, 100]")
        if self.samples == 1:
            raise SettingError("samples is 1; advantages compare the chains of a problem, use 2 or more")
        check_ranges(self, samples="[2, 1e4]")
        if self.prompts % self.prompts_per_update:
            raise ValueError(
                f"prompts is {self.prompts}, which is not a multiple of prompts_per_update {self.prompts_per_update}"
            )

    @property
    def by_judge(self) -> bool:
        """Whether the judge by rules gives the rewards, which needs no teacher."""
        return self.model == JUDGE

    @property
    def rows(self) -> int:
        """Drawn chains of an update, one a row."""
        return self.prompts_per_update * self.samples
