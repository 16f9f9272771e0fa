"""Chains that the student draws itself: how many, of which problems, and how long they serve."""

from dataclasses import dataclass

from rtd_jax.base.settings import SettingError, check_ranges

JUDGE = "judge"  # as `RewardSettings.model`


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
