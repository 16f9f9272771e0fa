"""Logit matching, alpha * T^2 * divergence + (1 - alpha) * CE; and the labels' cross-entropy without a teacher."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rtd_jax.base.boundaries import shifted_labels
from rtd_jax.base.means import Mean, Metrics
from rtd_jax.base.settings import check_ranges
from rtd_jax.base.types import Array, Batch, Params
from rtd_jax.losses.divergences import READ_BETA, Divergence
from rtd_jax.losses.kd import cross_entropy_sums, kd_sums, top_k_kd_sums
from rtd_jax.methods.term import Coefficients, MethodSettings, Outputs, Reads, Setup, Term


@dataclass(frozen=True)
class ChunkSettings(MethodSettings):
    """The key of `loss` that every term with an LM head inside reads."""

    chunk_length: int = 32  # positions of each row whose logits exist at one time

    def __post_init__(self) -> None:
        check_ranges(self, chunk_length="[1, 1e7]")


@dataclass(frozen=True)
class KDSettings(ChunkSettings):
    """Keys of `loss` that logit matching reads."""

    teaches_by: ClassVar[str] = "alpha"

    temperature: float = 4.0  # T of the soft loss
    alpha: float = 0.7  # share of the soft loss; the labels' cross-entropy gets 1 - alpha
    divergence: Divergence = "forward_kl"  # of teacher and student in the soft loss
    beta: float = 0.5  # jsd: teacher's share of the mixture (0: forward KL, 1: reverse); skewed KLs: the skew (0: none)

    def __post_init__(self) -> None:
        check_ranges(self, temperature="[0.001, 1e6]", alpha="[0, 1]", beta="[0, 1]")

    def unread_settings(self) -> dict[str, str]:
        return {} if self.divergence in READ_BETA else {"beta": f"loss.divergence is {self.divergence!r}"}

    def terms(self, setup: Setup) -> tuple[Term, ...]:
        sizes = setup.vocab_size, self.chunk_length, setup.mesh
        return (KD(1.0, self.temperature, self.alpha, *sizes, self.divergence, self.beta),)


@dataclass(frozen=True)
class KD(Term):
    """alpha * T^2 * KL(teacher_T || student_T) + (1 - alpha) * CE, summed over predicted tokens.

    Another divergence may take the place of KL. From the teacher's states and head, or from a cache's top k
    (`losses.kd`).
    """

    temperature: float
    alpha: float
    vocab_size: int
    chunk_length: int = 32
    mesh: Mesh | None = None
    divergence: Divergence = "forward_kl"
    beta: float = 0.5

    name: ClassVar[str] = "kd"
    setting: ClassVar[str] = "loss.alpha"

    @property
    def reads(self) -> Reads:
        return Reads(teacher_predictions=True)

    def on_own_chains(self, share: float) -> Term:
        """The divergence alone, for what the student drew is no label; nothing where the divergence is switched off."""
        return replace(self, weight=share * self.weight if self.alpha else 0.0, alpha=1.0, text="own")

    def coefficients(self) -> dict[str, float]:
        return {"weight": self.weight, "temperature": self.temperature, "alpha": self.alpha, "beta": self.beta}

    def denominator(self, batch: Batch) -> Array:
        return predicted_tokens(batch)

    def sums(self, outputs: Outputs, params: Params, coefficients: Coefficients) -> tuple[Array, Metrics]:
        student, teacher, batch = outputs
        options: dict[str, Any] = {
            "temperature": coefficients["temperature"],
            "alpha": coefficients["alpha"],
            "divergence": self.divergence,
            "beta": coefficients["beta"],
            "vocab_size": self.vocab_size,
            "chunk_length": self.chunk_length,
            "mesh": self.mesh,
        }
        labels = shifted_labels(batch)
        if teacher.top_k is not None:
            kd = top_k_kd_sums(student.hidden_BLS, student.head_SV, teacher.top_k, *labels, **options)
        else:
            assert teacher.hidden_BLD is not None, "the teacher's outputs have neither states nor cached predictions"
            assert teacher.head_DV is not None
            kd = kd_sums(student.hidden_BLS, student.head_SV, teacher.hidden_BLD, teacher.head_DV, *labels, **options)
        return kd.loss, {
            "distill/soft_loss": Mean(kd.soft, kd.weight),
            "distill/hard_loss": Mean(kd.hard, kd.weight),
            "distill/kl_div_T1": Mean(kd.kl_T1, kd.weight),
            "distill/token_accuracy": Mean(kd.correct, kd.weight),
        }


@dataclass(frozen=True)
class Labels(Term):
    """The labels' cross-entropy, summed over predicted tokens: fine-tuning on chains of thought, and pretraining."""

    vocab_size: int
    chunk_length: int = 32
    mesh: Mesh | None = None

    name: ClassVar[str] = "labels"
    setting: ClassVar[str] = "loss.alpha"

    @property
    def reads(self) -> Reads:
        return Reads()

    def denominator(self, batch: Batch) -> Array:
        return predicted_tokens(batch)

    def sums(self, outputs: Outputs, params: Params, coefficients: Coefficients) -> tuple[Array, Metrics]:
        student, _, batch = outputs
        total, weight = cross_entropy_sums(
            student.hidden_BLS,
            student.head_SV,
            *shifted_labels(batch),
            vocab_size=self.vocab_size,
            chunk_length=self.chunk_length,
            mesh=self.mesh,
        )
        return total, {"distill/hard_loss": Mean(jax.lax.stop_gradient(total), weight)}


def predicted_tokens(batch: Batch) -> Array:
    """Sum of the loss weights of a batch, float32 scalar."""
    return jnp.sum(shifted_labels(batch)[1])
