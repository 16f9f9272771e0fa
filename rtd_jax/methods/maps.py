"""The learned maps from student width to teacher width: f for states, g for transitions.

They are entries "f" and "g" of `TrainState.params`, [S, D] float32: both; f alone, for states and transitions; or none,
where the widths agree.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from rtd_jax.base.types import Array, Params
from rtd_jax.losses.trajectory import Projection

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
