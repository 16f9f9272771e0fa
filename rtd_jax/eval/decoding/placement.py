"""Where a student's weights lie while it writes texts."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from rtd_jax.base.sharding import FSDP, TENSOR, LogicalToMesh, activation_sharding, param_shardings
from rtd_jax.base.types import Params
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.weights import logical_axes


def for_writing(model: DecoderModel, params: Params, mesh: Mesh) -> tuple[DecoderModel, Params]:
    """A model that training spreads by the table FSDP, and a copy of its params, as writing reads them fastest.

    Training gathers each layer's float32 weights on every device; a step that adds one token a text would wait for that
    alone. The copy has its matrices in `compute_dtype`, in which they are used anyway, and spread by the table TENSOR:
    each device computes its heads and its part of the MLP for all texts, and only activations travel. Texts are the
    same but for rounding in sums over devices.

    Args:
      params: of the model; shapes with shardings give shapes with shardings.
    """
    sharding = activation_sharding(mesh, TENSOR)
    placed = dataclasses.replace(model, activation_sharding=sharding, quantization=None, adapter=None)
    if isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct):
        return placed, _shapes(
            lambda params: _cast(model.deployed(params)[1], model.compute_dtype), params, mesh, TENSOR
        )
    return placed, _copied(model.deployed(params)[1], model.compute_dtype, mesh)


def deployed_shapes(model: DecoderModel, params: Params, mesh: Mesh) -> tuple[DecoderModel, Params]:
    """`DecoderModel.deployed` of params as shapes with shardings: shapes, spread by the table FSDP."""
    deployed = dataclasses.replace(model, quantization=None, adapter=None)
    return deployed, _shapes(lambda params: model.deployed(params)[1], params, mesh, FSDP)


def _shapes(function: Callable[[Params], Params], params: Params, mesh: Mesh, table: LogicalToMesh) -> Params:
    shapes = jax.eval_shape(function, params)
    target = param_shardings(shapes, logical_axes(shapes), mesh, table)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, target)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _copied(params: Params, dtype: str, mesh: Mesh) -> Params:
    target = param_shardings(params, logical_axes(params), mesh, TENSOR)
    return jax.lax.with_sharding_constraint(_cast(params, dtype), target)


def _cast(params: Params, dtype: str) -> Params:
    """The matrices in `dtype`, norms as they are."""
    # The tuples of names are leaves here, as they are at the places of arrays.
    return jax.tree.map(lambda x, names: x if "norm" in names else x.astype(dtype), params, logical_axes(params))
