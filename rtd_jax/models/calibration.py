"""Runs a model layer by layer and hands out what each matrix of a layer read, as pruning and quantisation need it.

The weights of one layer and the states of one batch are enough in memory.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from rtd_jax.base.types import Array, Params
from rtd_jax.models.attention import attend_row, layer_angles, rope_angles
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.layers import Block, LayerInputs
from rtd_jax.models.model import DecoderModel, chain_mask
from rtd_jax.models.quantized import as_float


@functools.partial(jax.jit, static_argnums=0)
def embed(model: DecoderModel, params: Params, tokens_BL: Array) -> jax.Array:
    """The states that the first layer reads, [B, L, D] in `compute_dtype`."""
    rows = jax.tree.map(lambda part: part[jnp.asarray(tokens_BL)], params["embedding"])
    return as_float(rows, model.compute_dtype)


def layer_params(params: Params, layer: int) -> Params:
    """The weights of one layer, counted from 0: the entries of `params["layers"]` without their first axis."""
    return jax.tree.map(lambda stacked: stacked[layer], params["layers"])


@functools.partial(jax.jit, static_argnums=0)
def layer_inputs(
    model: DecoderModel, layer: int, layer_params: Params, x_BLD: jax.Array, positions_BL: Array, chain_ids_BL: Array
) -> tuple[jax.Array, LayerInputs]:
    """The states after one layer, [B, L, D] in `compute_dtype`, and what its matrices read.

    Padding (chain id 0) is computed like the rest: the caller masks it. Positions and ids as in `DecoderModel.hidden`.

    Args:
      layer: its number, from 0.
      layer_params: of one layer, as the function of that name gives them.
      x_BLD: the states before the layer; `embed`'s for the first.
    """
    mask, angles = chain_mask(chain_ids_BL), rope_angles(model.config, jnp.asarray(positions_BL))
    number = jnp.asarray(layer)

    def attend(q_BLHE, k_BLGE, v_BLGE):
        return attend_row(model, number, q_BLHE, k_BLGE, v_BLGE, mask), None

    x_BLD, _, inputs = nnx.merge(_block(model.config), layer_params)(
        x_BLD, layer_angles(model.config, angles, number), attend
    )
    return x_BLD, inputs


@functools.lru_cache(maxsize=64)
def _block(config: DecoderConfig) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: Block(config, jnp.dtype("float32"))))[0]
