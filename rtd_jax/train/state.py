"""What an update changes: the student, what is learned beside it, and the optimizer. No functions, no teacher."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rtd_jax.base.sharding import in_host_memory, param_shardings, replicated
from rtd_jax.base.types import Array, Params
from rtd_jax.models.adapters import has_adapter
from rtd_jax.models.weights import ADAPTER, BASE, logical_axes


class TrainState(NamedTuple):
    """A pure pytree. `params` is {"student": ..} and what the objective's terms learn beside it (`Term.init_params`).

    In most recipes these are "f" and "g", [S, D]; in plain pretraining nothing. Of a student with an adapter
    (`models.adapters`) the frozen base is among the params too, so that whoever runs the student finds it; it has no
    moments, takes part in no gradient, and is in no checkpoint.
    """

    step: Array  # int32, updates done
    params: Params
    opt_state: Any
    rng: Array  # base key; randomness is folded from it and `step`


def create_state(params: Params, optimizer: optax.GradientTransformation, rng: Array) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(without_base(params)), rng)


def without_base(params: Params) -> Params:
    """The params that are trained: all, or of a student with an adapter all but its frozen base."""
    if not _has_base(params):
        return params
    return {**params, "student": {ADAPTER: params["student"][ADAPTER]}}


def with_base(trained: Params, params: Params) -> Params:
    """What `without_base` left, with the frozen base of `params`, if they have one."""
    if not _has_base(params):
        return trained
    return {**trained, "student": {BASE: params["student"][BASE], **trained["student"]}}


def _has_base(params: Params) -> bool:
    return isinstance(params, dict) and has_adapter(params.get("student"))


def state_shardings(
    abstract: TrainState,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    axes: Mapping[str, tuple[str, ...]],
    offload: bool = False,
) -> TrainState:
    """The sharding of each array of the state. The moments of a parameter are sharded like the parameter.

    Args:
      axes: logical axes of what is learned beside the student (`Objective.param_axes`).
      offload: whether the moments lie in host memory.
    """
    logical = {"student": logical_axes(abstract.params["student"]), **axes}
    of_params = param_shardings(abstract.params, logical, mesh)
    whole = replicated(mesh)
    of_optimizer = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: in_host_memory(sharding) if offload else sharding,
        abstract.opt_state,
        without_base(of_params),
        transform_non_params=lambda _: whole,
    )
    return TrainState(whole, of_params, of_optimizer, whole)  # type: ignore[arg-type]  # a tree of shardings
