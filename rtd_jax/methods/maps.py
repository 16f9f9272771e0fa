"""What the terms on states share: whose states are matched, and through which learned maps.

f maps states and g transitions from student width to teacher width. They are the entries "f" and "g" of
`TrainState.params`, [S, D] float32. A recipe has both; f alone, for states and transitions; or none, where the widths
agree.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from rtd_jax.base.settings import LAYER, check_ranges
from rtd_jax.base.types import Array, Params
from rtd_jax.losses.trajectory import Projection
from rtd_jax.methods.term import MethodSettings, Reads, Setup

Maps = Literal["separate", "shared", "none"]
AXES = ("student_width", "teacher_width")


def init_map(key: Array, student_width: int, teacher_width: int) -> Array:
    """[S, D] float32: the identity where the widths agree (a student cut from its teacher), else LeCun normal."""
    if student_width == teacher_width:
        return jnp.eye(student_width)
    return jax.nn.initializers.lecun_normal()(jnp.asarray(key), (student_width, teacher_width), jnp.float32)


def init_state_map(key: Array, maps: Maps, student_width: int, teacher_width: int) -> Params:
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
    return {"f": init_map(jax.random.split(key)[0], student_width, teacher_width)}


def init_transition_map(key: Array, maps: Maps, student_width: int, teacher_width: int) -> Params:
    """{"g": ..}; {"f": ..} where one map serves both; or nothing. Raises ValueError as `init_state_map`."""
    if maps != "separate":
        return init_state_map(key, maps, student_width, teacher_width)
    return {"g": init_map(jax.random.split(key)[1], student_width, teacher_width)}


def state_map(params: Params) -> Projection:
    """f, or None (the identity) where there is none."""
    return params.get("f")


def transition_map(params: Params) -> Projection:
    """g; f where one map serves both; None (the identity) where there is none."""
    return params.get("g", params.get("f"))


@dataclass(frozen=True)
class TrajectorySettings(MethodSettings):
    """Keys of `loss` that the terms on hidden states share."""

    reads_states: ClassVar[bool] = True

    hidden_layer: int = -1  # of the teacher, matched at the boundaries; -1 is the final normed state
    student_hidden_layer: int = -1  # of the student; -1 is the final normed state
    projections: Maps = "separate"  # f for states and g for transitions: separate, shared (one map) or none

    def __post_init__(self) -> None:
        check_ranges(self, hidden_layer=LAYER, student_hidden_layer=LAYER)

    def matched_layers(self, setup: Setup) -> tuple[int, int]:
        """(student's, teacher's) layer whose states are compared, counted from 0.

        Raises:
          ValueError: a layer that does not exist.
        """
        return (
            setup.student.layer_index(self.student_hidden_layer),
            setup.teacher.layer_index(self.hidden_layer),
        )


def boundary_reads(layers: tuple[int, int]) -> Reads:
    """The states of a (student, teacher) pair of layers at the boundaries."""
    student, teacher = layers
    return Reads(student_boundaries=(student,), teacher_boundaries=(teacher,))
