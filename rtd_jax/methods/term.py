"""A term of the objective: what it reads, what it learns beside the student, what it is averaged over, and its sum.

    L = sum over terms of  weight * (sum over the rows) / (denominator over the global batch)

The denominators are counted over the *global* batch, so that adding the gradients of micro-batches, or of devices,
gives the gradient of the batch, whatever the split. A term is a frozen dataclass; what may change without compiling
anew (its weight, a temperature) is handed to it as traced scalars, its `coefficients`.
"""

import abc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from rtd_jax.base.means import Metrics, safe_divide
from rtd_jax.base.types import Array, Batch, Params, StepState, StudentOutputs, TeacherOutputs
from rtd_jax.methods.own_chains import OnPolicySettings, RewardSettings
from rtd_jax.models.config import DecoderConfig

# Which chains a term is about: those of the data, or those that the student draws itself.
Text = Literal["data", "own"]
Coefficients = Mapping[str, Any]  # of one term: traced float32 scalars by name


class Outputs(NamedTuple):
    """What a term is computed from: both models' outputs on some rows, and the rows."""

    student: StudentOutputs  # differentiable
    teacher: TeacherOutputs  # constant; empty where nothing of it is read
    batch: Any  # a `Batch`, or for `text` "own" the drawn chains


@dataclass(frozen=True)
class Reads:
    """What a term needs of the two models. Layers are counted from 0 (embeddings) to N (final normed states)."""

    student_boundaries: tuple[int, ...] = ()  # layers whose states are read for each step
    student_tokens: tuple[int, ...] = ()  # layers whose states are read at every token
    teacher_boundaries: tuple[int, ...] = ()
    teacher_tokens: tuple[int, ...] = ()  # no cache has these
    teacher_predictions: bool = False
    step_state: StepState = "end"  # of which tokens a step's state is made; read where there are boundaries

    @property
    def teacher_states(self) -> bool:
        """Whether hidden states of the teacher are read."""
        return bool(self.teacher_boundaries or self.teacher_tokens)

    @property
    def teacher(self) -> bool:
        """Whether anything of the teacher is read."""
        return self.teacher_states or self.teacher_predictions

    def __or__(self, other: "Reads") -> "Reads":
        return Reads(
            tuple(dict.fromkeys((*self.student_boundaries, *other.student_boundaries))),
            tuple(dict.fromkeys((*self.student_tokens, *other.student_tokens))),
            tuple(dict.fromkeys((*self.teacher_boundaries, *other.teacher_boundaries))),
            tuple(dict.fromkeys((*self.teacher_tokens, *other.teacher_tokens))),
            self.teacher_predictions or other.teacher_predictions,
            self.step_state if self.student_boundaries or self.teacher_boundaries else other.step_state,
        )


@dataclass(frozen=True)
class Term(abc.ABC):
    """One term. Subclasses add what is compiled into them: layers, forms, the vocabulary's size."""

    weight: float
    text: Text = field(default="data", kw_only=True)

    name: ClassVar[str]
    setting: ClassVar[str]  # the key of a recipe that switches it off at 0

    @property
    def key(self) -> str:
        """Names its coefficients and its denominator: a term may be there twice, about the data's and own chains."""
        return self.name if self.text == "data" else f"own/{self.name}"

    def on_own_chains(self, share: float) -> "Term":
        """The same about chains that the student draws, with this share of the weight."""
        return replace(self, weight=share * self.weight, text="own")

    @property
    @abc.abstractmethod
    def reads(self) -> Reads:
        """What the term needs of the two models."""

    def coefficients(self) -> dict[str, float]:
        """The scalars that are traced; "weight" is among them."""
        return {"weight": self.weight}

    def init_params(self, key: Array, student_width: int, teacher_width: int, kept_S: Array | None = None) -> Params:
        """What is learned beside the student, by its name in `TrainState.params`; terms may share an entry.

        Args:
          kept_S: int32 [S], the teacher's hidden unit that each of the student's was; None where it was not pruned.

        Raises:
          ValueError: widths that the term cannot join.
        """
        return {}

    def param_axes(self) -> dict[str, tuple[str, ...]]:
        """Logical axes of each entry of `init_params`, for `base.sharding`."""
        return {}

    @abc.abstractmethod
    def denominator(self, batch: Any) -> Array:
        """What the term is averaged over, float32 scalar. Called on the global batch, before any split."""

    @abc.abstractmethod
    def sums(self, outputs: Outputs, params: Params, coefficients: Coefficients) -> tuple[Array, Metrics]:
        """The sum over the rows given, float32 scalar, and what is measured beside it as (sum, count).

        Args:
          outputs: of both models on the rows, with what `reads` names.
          params: entries of `init_params`, of all terms.
          coefficients: the traced form of `coefficients()`.
        """


@dataclass(frozen=True)
class Setup:
    """What terms are built for: two models, a vocabulary and a mesh."""

    student: DecoderConfig
    teacher: DecoderConfig
    vocab_size: int  # real entries
    reward: RewardSettings = RewardSettings()
    mesh: Mesh | None = None
    on_policy: OnPolicySettings = OnPolicySettings()
    teacher_states: bool = True  # False: the teacher's predictions are all that there is of it


class MethodSettings:
    """The keys of a recipe's `loss` that one method reads, and the terms that they stand for."""

    # The key whose value, if not 0, puts something of the teacher into the loss on the data's chains.
    teaches_by: ClassVar[str] = ""
    # Whether it reads the teacher's hidden states, which a cache may lack.
    reads_states: ClassVar[bool] = False

    def unread_settings(self) -> dict[str, str]:
        """The method's keys that are not read because of others, and why."""
        return {}

    def terms(self, setup: Setup) -> tuple[Term, ...]:
        """The method's terms; none where it is switched off and nothing of it is measured."""
        raise NotImplementedError


@dataclass(frozen=True)
class Objective:
    """A sum of terms, and the term whose value on validation chains can end a stage of the curriculum.

    `dormant` terms are not part of the sum, but what they learn is there all the same: which arrays a checkpoint holds
    does not depend on whether the teacher is read.
    """

    terms: tuple[Term, ...]
    yardstick: Term | None = None
    dormant: tuple[Term, ...] = ()

    def __post_init__(self) -> None:
        keys = [term.key for term in (*self.terms, *self.dormant)]
        assert len(set(keys)) == len(keys), f"terms are told apart by their keys, which are {keys}"

    def on(self, text: Text) -> tuple[Term, ...]:
        """The terms about one kind of chains."""
        return tuple(term for term in self.terms if term.text == text)

    @property
    def validates(self) -> bool:
        """Whether there is a yardstick, and a teacher in the loss to measure the student by."""
        return self.yardstick is not None and self.reads_teacher

    @property
    def reads_teacher(self) -> bool:
        """Whether the loss has anything of the teacher in it, on the data's chains or on the student's own."""
        return reads_of(self.terms).teacher

    def coefficients(self) -> dict[str, dict[str, float]]:
        """What an update takes as its traced argument."""
        return {term.key: term.coefficients() for term in self.terms}

    def init_params(self, key: Array, student_width: int, teacher_width: int, kept_S: Array | None = None) -> Params:
        """What all terms learn beside the student. An entry does not depend on which other terms there are."""
        params: Params = {}
        for term in (*self.terms, *self.dormant):
            params |= term.init_params(key, student_width, teacher_width, kept_S)
        return params

    def param_axes(self) -> dict[str, tuple[str, ...]]:
        """Logical axes of what `init_params` gives."""
        axes: dict[str, tuple[str, ...]] = {}
        for term in (*self.terms, *self.dormant):
            axes |= term.param_axes()
        return axes

    def denominators(self, batch: Batch | None, own: Any = None) -> dict[str, Array]:
        """Each term's denominator over the global batch; call it before any split."""
        chains = {"data": batch, "own": own}
        there = (term for term in self.terms if chains[term.text] is not None)
        return {term.key: term.denominator(chains[term.text]) for term in there}


def reads_of(terms: Iterable[Term]) -> Reads:
    """What several terms need together."""
    reads = Reads()
    for term in terms:
        reads |= term.reads
    return reads


def weighted_sum(
    terms: Sequence[Term],
    outputs: Outputs,
    params: Params,
    coefficients: Mapping[str, Coefficients],
    denominators: Mapping[str, Array],
) -> tuple[Array, Metrics]:
    """sum of weight * sums / denominator, float32 scalar, and the metrics of all terms."""
    loss, metrics = jnp.zeros(()), Metrics()
    for term in terms:
        total, measured = term.sums(outputs, params, coefficients[term.key])
        loss += coefficients[term.key]["weight"] * safe_divide(total, denominators[term.key])
        if term.text == "own":
            measured = {name.replace("distill/", "own/"): mean for name, mean in measured.items()}
        metrics |= measured
    return loss, metrics
