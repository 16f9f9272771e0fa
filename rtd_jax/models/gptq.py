"""GPTQ: rounds a matrix column by column, and has the columns that are left make up for each column's error.

    min over W_q of ||X W^T - X W_q^T||^2,  X the inputs of the matrix on calibration text

Frantar et al. 2022 (arXiv:2210.17323), Algorithm 1. A group's scale is taken when its first column is reached, from
columns that hold what earlier ones left over. qwix has the algorithm too; its loop over columns is unrolled by Python,
and zero points and fewer than 4 bits fail in it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from qwix import QArray

from rtd_jax.base.types import Array, Params
from rtd_jax.models.calibration import LayerInputs, embed, layer_inputs, layer_params
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.schemes import BITS, Scheme, as_layer, round_matrix, rounded
from rtd_jax.models.weights import ROWS

DAMPING = 0.01  # of the mean of the diagonal, added to it; the paper's
_BLOCK = 128  # columns whose errors reach later columns in one product, where a scale is of the whole row
# Which matrices read the same, in the order in which a layer computes.
_PARTS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("attention_BLD", (("attention", "q"), ("attention", "k"), ("attention", "v"))),
    ("mixed_BLHE", (("attention", "o"),)),
    ("mlp_BLD", (("mlp", "gate"), ("mlp", "up"))),
    ("neurons_BLF", (("mlp", "down"),)),
)
# A batch of calibration text: tokens, positions and chain ids, each [B, L]; chain 0 is padding.
Rows = tuple[Array, Array, Array]


def gptq_matrix(weight_OI: jax.Array, gram_II: jax.Array, scheme: Scheme) -> QArray:
    """A matrix of outputs by inputs, rounded by GPTQ. qvalue [O, I]; scale, zero_point [O, groups].

    Args:
      gram_II: mean over tokens of x x^T, of the inputs x; all zeros gives what `round_matrix` gives.
      scheme: of integers.

    Raises:
      ValueError: the gram has no Cholesky factor, as where inputs are not finite.
    """
    rounded_OI, is_fitted = _fitted(weight_OI, gram_II, scheme)
    if not is_fitted:
        raise ValueError(
            "the inputs of a matrix on the calibration text are not finite, or too alike to be fitted to; check the "
            "model's weights, or give more and other chains"
        )
    return rounded_OI


@functools.partial(jax.jit, static_argnums=2)
def _fitted(weight_OI: jax.Array, gram_II: jax.Array, scheme: Scheme) -> tuple[QArray, jax.Array]:
    """(the rounded matrix, whether the factor that it needs is finite)."""
    inputs = weight_OI.shape[1]
    weight_OI, gram_II = weight_OI.astype(jnp.float32), gram_II.astype(jnp.float32)
    diagonal_I = jnp.diag(gram_II)
    damped_I = jnp.where(diagonal_I == 0, 1.0, diagonal_I) + DAMPING * jnp.mean(diagonal_I)  # 0: an input never used
    gram_II = gram_II.at[jnp.arange(inputs), jnp.arange(inputs)].set(damped_I)
    inverse_II = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(gram_II), True), jnp.eye(inputs))
    factor_II = jnp.linalg.cholesky(inverse_II, upper=True)

    whole = Scheme(scheme.qtype, 0, scheme.symmetric)
    block = scheme.group_size or (_BLOCK if inputs % _BLOCK == 0 else inputs)
    of_rows = round_matrix(weight_OI, whole)
    low, high = -(2 ** (BITS[scheme.qtype] - 1)), 2 ** (BITS[scheme.qtype] - 1) - 1

    def round_block(weight_OI: jax.Array, start: jax.Array) -> tuple[jax.Array, Any]:
        columns_OK = jax.lax.dynamic_slice_in_dim(weight_OI, start, block, axis=1)
        rows_KI = jax.lax.dynamic_slice_in_dim(factor_II, start, block, axis=0)
        square_KK = jax.lax.dynamic_slice_in_dim(rows_KI, start, block, axis=1)
        found = round_matrix(columns_OK, whole) if scheme.group_size else of_rows
        scale_O = found.scale[:, 0]
        zero_O = jnp.zeros_like(scale_O) if found.zero_point is None else found.zero_point[:, 0].astype(jnp.float32)

        def round_column(columns_OK: jax.Array, k: jax.Array) -> tuple[jax.Array, Any]:
            column_O = columns_OK[:, k]
            values_O = jnp.clip(jnp.round(column_O / scale_O + zero_O), low, high)
            error_O = (column_O - (values_O - zero_O) * scale_O) / square_KK[k, k]
            return columns_OK - error_O[:, None] * square_KK[k], (values_O, error_O)

        _, (values_KO, errors_KO) = jax.lax.scan(round_column, columns_OK, jnp.arange(block))
        is_later_I = jnp.arange(inputs) >= start + block
        weight_OI = weight_OI - errors_KO.T @ jnp.where(is_later_I, rows_KI, 0.0)
        return weight_OI, (values_KO.T, found.scale, found.zero_point)

    starts = jnp.arange(0, inputs, block)
    _, (values_GOK, scales_GO1, zeros_GO1) = jax.lax.scan(round_block, weight_OI, starts)
    qvalue_OI = jnp.swapaxes(values_GOK, 0, 1).reshape(weight_OI.shape).astype(of_rows.qvalue.dtype)
    is_fitted = jnp.isfinite(factor_II).all()
    if not scheme.group_size:
        return QArray(qvalue_OI, of_rows.scale, of_rows.zero_point, of_rows.qtype), is_fitted
    scale_OG, zero_OG = jax.tree.map(lambda x: x[..., 0].T, (scales_GO1, zeros_GO1))
    return QArray(qvalue_OI, scale_OG, zero_OG, of_rows.qtype), is_fitted


def gptq(
    model: DecoderModel,
    params: Params,
    batches: Sequence[Rows],
    scheme: Scheme,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Params:
    """The params with every matrix of the scheme rounded, those of the layers by GPTQ: the form of `schemes.rounded`.

    Layer by layer, and inside a layer in the order of its products, each matrix is fitted to what it reads where all
    before it are rounded. The embedding and the head, if the scheme has them, are rounded to the nearest.

    Args:
      batches: of calibration text.
      progress: called after each layer with (layers done, layers in all).

    Raises:
      ValueError: the scheme is not of integers, or there is no calibration text.
    """
    if not scheme.qtype.startswith("int"):
        raise ValueError(f"GPTQ rounds to integers, not to {scheme.qtype}; use int8, int4, int3 or int2")
    if not any((chain_ids_BL != 0).any() for _, _, chain_ids_BL in batches):
        raise ValueError("GPTQ needs calibration text, and there is none; give chains")
    model, params = model.deployed(params)
    states = [embed(model, params, tokens_BL) for tokens_BL, _, _ in batches]
    layers: list[Params] = []
    for number in range(model.config.layers):
        layer = layer_params(params, number)
        found: dict[tuple[str, ...], QArray] = {}
        for inputs, paths in _PARTS:
            gram_II = _gram(model, number, layer, states, batches, inputs)
            flat = flatten_dict(layer)
            for path in paths:
                weight = ROWS["layers", *path]
                found[path] = gptq_matrix(weight.to_matrix(flat[path]), gram_II, scheme)
                flat[path] = as_layer(found[path], weight, flat[path].shape)
            layer = unflatten_dict(flat)
        states = [
            layer_inputs(model, number, layer, x_BLD, *batch[1:])[0]
            for x_BLD, batch in zip(states, batches, strict=True)
        ]
        layers.append(unflatten_dict(flatten_dict(layer) | found))
        progress(number + 1, model.config.layers)
    rest = rounded({name: x for name, x in params.items() if name != "layers"}, scheme)
    return {**rest, "layers": jax.tree.map(lambda *parts: jnp.stack(parts), *layers)}


def _gram(
    model: DecoderModel, number: int, layer: Params, states: Sequence[jax.Array], batches: Sequence[Rows], inputs: str
) -> jax.Array:
    """Mean over the tokens that are no padding of x x^T, float32 [I, I]."""
    total, count = jnp.zeros(()), 0
    for x_BLD, (_, positions_BL, chain_ids_BL) in zip(states, batches, strict=True):
        read: LayerInputs = layer_inputs(model, number, layer, x_BLD, positions_BL, chain_ids_BL)[1]
        total = total + _summed(getattr(read, inputs), jnp.asarray(chain_ids_BL))
        count += int((chain_ids_BL != 0).sum())
    return total / count


@jax.jit
def _summed(read: jax.Array, chain_ids_BL: jax.Array) -> jax.Array:
    read_TI = read.reshape(chain_ids_BL.size, -1).astype(jnp.float32) * (chain_ids_BL.reshape(-1, 1) != 0)
    return jnp.matmul(read_TI.T, read_TI, precision="highest")
