"""What an update changes: the student, its projections f and g, and the optimizer. No functions, no teacher."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rtd_jax.common.sharding import in_host_memory, param_shardings, replicated
from rtd_jax.common.types import Array, Params
from rtd_jax.losses import Projections
from rtd_jax.models.weights import logical_axes


class TrainState(NamedTuple):
    """A pure pytree. `params` is {"student": .., "f": [S, D], "g": [S, D]}; f and g are absent in plain pretraining.

    "regressors" [P, S, D] is there when P layer pairs are matched at every token.
    """

    step: Array  # int32, updates done
    params: Params
    opt_state: Any
    rng: Array  # base key; randomness is folded from it and `step`


def init_projections(key: jax.Array, student_width: int, teacher_width: int, pairs: int = 0) -> Params:
    """f and g, [S, D] float32: the identity where the widths agree (student cut from teacher), else LeCun normal.

    With `pairs`, also one regressor for each pair of layers, [P, S, D].
    """
    count = 2 + pairs
    if student_width == teacher_width:
        maps = jnp.tile(jnp.eye(student_width), (count, 1, 1))
    else:
        init = jax.nn.initializers.lecun_normal()
        # f and g do not depend on `pairs`, so that methods compared under one seed start alike.
        keys = [*jax.random.split(key), *jax.random.split(jax.random.fold_in(key, 1), pairs)]
        maps = jnp.stack([init(key, (student_width, teacher_width), jnp.float32) for key in keys])
    regressors = {"regressors": maps[2:]} if pairs else {}
    return {"f": maps[0], "g": maps[1], **regressors}


def projections(params: Params) -> Projections:
    return Projections(f=params["f"], g=params["g"])


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
