"""What the terms on states share: whose states are matched, of which tokens, and through which learned maps.

f maps states and g transitions from student width to teacher width. They are the entries "f" and "g" of
`TrainState.params`, float32 [S, D], or [P, S, D] where P > 1 pairs of layers are matched, each by its own map. A recipe
has both; f alone, for states and transitions; or none, where the widths agree.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import jax
import jax.numpy as jnp

from rtd_jax.base.settings import LAYER, check_ranges
from rtd_jax.base.types import Array, Params, StepState
from rtd_jax.losses.trajectory import Distance, Projection
from rtd_jax.methods.term import MethodSettings, Reads, Setup, Term
from rtd_jax.models.config import DecoderConfig, layers_to_match

Maps = Literal["separate", "shared", "none"]
Pairs = tuple[tuple[int, int], ...]  # (student's, teacher's) layers, counted from 0
AXES = ("student_width", "teacher_width")


def init_map(key: Array, student_width: int, teacher_width: int, kept_S: Array | None = None) -> Array:
    """[S, D] float32: what a student that is cut from its teacher starts with, else LeCun normal.

    That is the identity where the widths agree, and 1 at (s, kept_S[s]) where it has some of the teacher's units.
    """
    if student_width == teacher_width:
        return jnp.eye(student_width)
    if kept_S is not None:
        return jax.nn.one_hot(kept_S, teacher_width)
    return jax.nn.initializers.lecun_normal()(jnp.asarray(key), (student_width, teacher_width), jnp.float32)


def init_maps(key: Array, pairs: Pairs, student_width: int, teacher_width: int, kept_S: Array | None = None) -> Array:
    """[S, D], or [P, S, D] for several pairs of layers."""
    if len(pairs) == 1:
        return init_map(key, student_width, teacher_width, kept_S)
    return jnp.stack([init_map(key, student_width, teacher_width, kept_S) for key in jax.random.split(key, len(pairs))])


def map_axes(pairs: Pairs) -> tuple[str, ...]:
    """Logical axes of f and of g."""
    return AXES if len(pairs) == 1 else ("layers", *AXES)


def init_state_map(
    key: Array, maps: Maps, pairs: Pairs, student_width: int, teacher_width: int, kept_S: Array | None = None
) -> Params:
    """{"f": ..}, or nothing.

    Raises:
      ValueError: no map, but different widths.
    """
    if maps == "none":
        if student_width != teacher_width:
            raise ValueError(
                f"loss.projections is 'none', but the student's width is {student_width} and the teacher's "
                f"{teacher_width}: states of different widths need a map; use 'separate' or 'shared'"
            )
        return {}
    return {"f": init_maps(jax.random.split(key)[0], pairs, student_width, teacher_width, kept_S)}


def init_transition_map(
    key: Array, maps: Maps, pairs: Pairs, student_width: int, teacher_width: int, kept_S: Array | None = None
) -> Params:
    """{"g": ..}; {"f": ..} where one map serves both; or nothing. Raises ValueError as `init_state_map`."""
    if maps != "separate":
        return init_state_map(key, maps, pairs, student_width, teacher_width, kept_S)
    return {"g": init_maps(jax.random.split(key)[1], pairs, student_width, teacher_width, kept_S)}


def state_map(params: Params) -> Array | None:
    """f of all pairs of layers, or None (the identity) where there is none."""
    return params.get("f")


def transition_map(params: Params) -> Array | None:
    """g of all pairs of layers; f where one map serves both; None (the identity) where there is none."""
    return params.get("g", params.get("f"))


def last_map(maps: Array | None) -> Array | None:
    """The map of the last pair of layers, [S, D]."""
    return maps if maps is None or jnp.ndim(maps) == 2 else maps[-1]


def matched(
    student_states: Mapping[int, Array], teacher_states: Mapping[int, Array], pairs: Pairs, maps: Array | None
) -> Iterator[tuple[Array, Array, Projection]]:
    """(student's states, teacher's states, the map between them) of each pair of layers."""
    # Several maps are iterated over: `maps[i]` cannot be differentiated into `accumulate`'s references.
    own = [maps] * len(pairs) if maps is None or len(pairs) == 1 else maps
    for (of_student, of_teacher), projection in zip(pairs, own, strict=True):
        yield student_states[of_student], teacher_states[of_teacher], projection


@dataclass(frozen=True)
class TrajectorySettings(MethodSettings):
    """Keys of `loss` that the terms on hidden states share."""

    reads_states: ClassVar[bool] = True

    hidden_layer: int = -1  # of the teacher, matched for each step; -1 is the final normed state
    student_hidden_layer: int = -1  # of the student; -1 is the final normed state
    layers: str = ""  # several pairs instead: "evenly:4", or student:teacher as in "1:2,2:4"; empty: the pair above
    step_state: StepState = "end"  # a step's state: at its last token, the mean over its tokens or its conclusion's
    distance: Distance = "cosine"  # of states and of transitions; squared: |a - b|^2 / |b|^2, so lengths count too
    projections: Maps = "separate"  # f for states and g for transitions: separate, shared (one map) or none

    def __post_init__(self) -> None:
        check_ranges(self, hidden_layer=LAYER, student_hidden_layer=LAYER)
        _parsed(self.layers)

    def unread_settings(self) -> dict[str, str]:
        return dict.fromkeys(["hidden_layer", "student_hidden_layer"], "loss.layers is set") if self.layers else {}

    def matched_layers(self, setup: Setup) -> Pairs:
        """The (student's, teacher's) layers whose states are compared, counted from 0.

        Raises:
          ValueError: a layer that does not exist.
        """
        return tuple(zip(self._column(0, setup.student), self.teacher_layers(setup.teacher), strict=True))

    def teacher_layers(self, teacher: DecoderConfig) -> tuple[int, ...]:
        """The teacher's layer of each pair, counted from 0. Raises ValueError for a layer that does not exist."""
        return self._column(1, teacher)

    def _column(self, side: int, config: DecoderConfig) -> tuple[int, ...]:
        given = _parsed(self.layers) if self.layers else ((self.student_hidden_layer, self.hidden_layer),)
        if isinstance(given, int):
            return layers_to_match(config.layers, given)
        return tuple(config.layer_index(pair[side]) for pair in given)


def _parsed(layers: str) -> Pairs | int:
    """The pairs that `loss.layers` names, as they are counted there, or how many evenly spaced ones."""
    if found := re.fullmatch(r"evenly:([1-9]\d{0,3})", layers):
        return int(found[1])
    if layers and not re.fullmatch(r"-?\d{1,4}:-?\d{1,4}(,-?\d{1,4}:-?\d{1,4})*", layers):
        raise ValueError(
            f"layers is {layers!r}; expected evenly:<how many>, such as 'evenly:4', or pairs of a student's and a "
            "teacher's layer, such as '1:2,2:4' (0: embeddings, -1: final normed state)"
        )
    pairs = tuple((int(own), int(its)) for own, its in (pair.split(":") for pair in layers.split(",") if pair))
    if len(set(pairs)) < len(pairs):
        raise ValueError(f"layers is {layers!r}; expected each pair once")
    return pairs


@dataclass(frozen=True)
class TrajectoryTerm(Term):
    """A term on the states of pairs of layers, one for each step; the loss is the mean over the pairs."""

    layers: Pairs
    maps: Maps = "separate"
    step_state: StepState = "end"
    distance: Distance = "cosine"

    @property
    def reads(self) -> Reads:
        students, teachers = map(layers_of, zip(*self.layers, strict=True))
        return Reads(student_boundaries=students, teacher_boundaries=teachers, step_state=self.step_state)

    def of_teacher_alone(self) -> Self:
        """The same between two readings by the teacher: each of its layers with itself, without a map."""
        return replace(self, layers=tuple((its, its) for _, its in self.layers), maps="none")


def layers_of(column: Iterable[int]) -> tuple[int, ...]:
    """The layers in one column of the pairs, each once."""
    return tuple(dict.fromkeys(column))
