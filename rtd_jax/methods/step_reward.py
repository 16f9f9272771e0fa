"""A rival: the student draws chains of its own, and each of their steps is rewarded by itself."""

from dataclasses import dataclass, field
from typing import ClassVar

import jax
from jax.sharding import Mesh

from rtd_jax.base.boundaries import shifted, shifted_labels
from rtd_jax.base.means import Mean, Metrics
from rtd_jax.base.settings import check_ranges
from rtd_jax.base.types import Array, Params
from rtd_jax.losses.policy import Rollouts, policy_sums
from rtd_jax.methods.kd import ChunkSettings, predicted_tokens
from rtd_jax.methods.term import Coefficients, Outputs, Reads, Setup, Term, Text


@dataclass(frozen=True)
class StepRewardSettings(ChunkSettings):
    """Keys of `loss` that the rewards of steps read; the group `reward` has the others (`RewardSettings`)."""

    reward_weight: float = 0.0  # a baseline: rewards of the steps of the student's own chains

    def __post_init__(self) -> None:
        check_ranges(self, reward_weight="[0, 1e6]")

    def terms(self, setup: Setup) -> tuple[Term, ...]:
        if not self.reward_weight:
            return ()
        policy = setup.reward.temperature, setup.reward.clip
        return (StepReward(self.reward_weight, *policy, setup.vocab_size, self.chunk_length, setup.mesh),)


@dataclass(frozen=True)
class StepReward(Term):
    """The clipped policy term, -min(rho A, clip(rho) A), summed over the tokens of drawn steps (`losses.policy`)."""

    temperature: float
    clip: float
    vocab_size: int
    chunk_length: int = 32
    mesh: Mesh | None = None

    text: Text = field(default="own", kw_only=True)

    name: ClassVar[str] = "reward"
    setting: ClassVar[str] = "loss.reward_weight"

    @property
    def reads(self) -> Reads:
        return Reads()  # of the teacher only the rewards, which are made when the chains are drawn

    def denominator(self, batch: Rollouts) -> Array:
        return predicted_tokens(batch.batch)

    def sums(self, outputs: Outputs, params: Params, coefficients: Coefficients) -> tuple[Array, Metrics]:
        student, _, batch = outputs
        sums = policy_sums(
            student.hidden_BLS,
            student.head_SV,
            *shifted_labels(batch.batch),
            shifted(batch.old_log_probs_BL),
            shifted(batch.advantages_BL),
            temperature=self.temperature,
            clip=self.clip,
            vocab_size=self.vocab_size,
            chunk_length=self.chunk_length,
            mesh=self.mesh,
        )
        measured = {"policy_loss": sums.loss, "clip_fraction": sums.clipped, "policy_kl": sums.kl}
        metrics = {f"reward/{name}": Mean(jax.lax.stop_gradient(x), sums.weight) for name, x in measured.items()}
        return sums.loss, metrics
