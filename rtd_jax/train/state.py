"""What an update changes: the student, its projections f and g, and the optimizer. No functions, no teacher."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rtd_jax.base.sharding import in_host_memory, param_shardings, replicated
from rtd_jax.base.types import Array, Params
from rtd_jax.losses import Projections
from rtd_jax.models.weights import logical_axes

# f and g apart, as in the article; one map for both; or none, where student and teacher are equally wide.
Maps = Literal["separate", "shared", "none"]


class TrainState(NamedTuple):
    """A pure pytree. `params` is {"student": .., "f": [S, D], "g": [S, D]}; f and g are absent in plain pretraining,
    and where a recipe has one map (no g) or none.

    "regressors" [P, S, D] is there when P layer pairs are matched at every token.
    """

    step: Array  # int32, updates done
    params: Params
    opt_state: Any
    rng: Array  # base key; randomness is folded from it and `step`


def init_projections(
    key: jax.Array, student_width: int, teacher_width: int, pairs: int = 0, maps: Maps = "separate"
) -> Params:
    """f and g, [S, D] float32: the identity where the widths agree (student cut from teacher), else LeCun normal.

    With `pairs`, also one regressor for each pair of layers, [P, S, D].

    Raises:
      ValueError: no maps, but different widths.
    """
    if maps == "none" and student_width != teacher_width:
        raise ValueError(
            f"loss.projections is 'none', but the student's width is {student_width} and the teacher's "
            f"{teacher_width}: states of different widths need a map; use 'separate' or 'shared'"
        )
    count = 2 + pairs
    if student_width == teacher_width:
        initial = jnp.tile(jnp.eye(student_width), (count, 1, 1))
    else:
        init = jax.nn.initializers.lecun_normal()
        # f and g do not depend on `pairs`, so that methods compared under one seed start alike.
        keys = [*jax.random.split(key), *jax.random.split(jax.random.fold_in(key, 1), pairs)]
        initial = jnp.stack([init(key, (student_width, teacher_width), jnp.float32) for key in keys])
    regressors = {"regressors": initial[2:]} if pairs else {}
    return dict(zip(map_names(maps), initial[:2], strict=False)) | regressors


def map_names(maps: Maps) -> tuple[str, ...]:
    """The maps that are params of a recipe."""
    return {"separate": ("f", "g"), "shared": ("f",), "none": ()}[maps]


def projections(params: Params) -> Projections:
    """f and g, the same array where there is one for both; None, the identity, where there is none."""
    f = params.get("f")
    return Projections(f=f, g=params.get("g", f))


def create_state(params: Params, optimizer: optax.GradientTransformation, rng: jax.Array) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), rng)


def state_shardings(
    abstract: TrainState, optimizer: optax.GradientTransformation, mesh: Mesh, offload: bool = False
) -> TrainState:
    """Where each array of the state lives. Optimizer moments lie like the parameter they belong to; with `offload`, in
    host memory."""
    axes: Params = {"student": logical_axes(abstract.params["student"])}
    axes |= {name: ("student_width", "teacher_width") for name in ("f", "g") if name in abstract.params}
    if "regressors" in abstract.params:
        axes["regressors"] = ("layers", "student_width", "teacher_width")
    of_params = param_shardings(abstract.params, axes, mesh)
    whole = replicated(mesh)
    of_optimizer = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: in_host_memory(sharding) if offload else sharding,
        abstract.opt_state,
        of_params,
        transform_non_params=lambda _: whole,
    )
    return TrainState(whole, of_params, of_optimizer, whole)  # type: ignore[arg-type]  # a tree of shardings
