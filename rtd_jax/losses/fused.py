"""Functions of logits, a chunk of positions at a time, with the LM head applied inside; and sums of losses on them.

The logits of a batch, [B, L, V], never exist. `fused_sums` computes the gradient with respect to a chunk's logits
while they exist, and from it the gradients of the states and the head, which the backward pass only scales. A loss
therefore returns its value and its gradient with respect to the logits.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rtd_jax.base.sharding import ROW_AXES, constrain, row_ways
from rtd_jax.base.types import Array
from rtd_jax.losses.checks import check_count, check_vocabulary
from rtd_jax.losses.divergences import mask_padding

# (logits, constants, chunk of arrays) -> (sum of losses, other sums, gradient of the first with respect to the logits)
LogitLosses = Callable[[Array, tuple, tuple], tuple[Array, Any, Array]]


def over_chunks(
    part: Callable[..., tuple[Any, Any]], arrays_BL: tuple[Array, ...], chunk_length: int
) -> tuple[Any, Any]:
    """Applies `part` to chunks of positions: the sum of its first results, and its second results joined along L.

    Chunks run along L and keep B whole, so that a batch sharded over rows stays where it is. The last chunk is filled
    up with zeros, which are tokens of weight 0.

    Args:
      part: (chunks of the arrays, [B, chunk_length, ...] each) -> (sums, results [B, chunk_length, ...]).
      arrays_BL: arrays [B, L, ...].
      chunk_length: positions of each row that are handled at one time.

    Raises:
      ValueError: a chunk has no positions.
    """
    check_count("chunk_length", chunk_length)
    rows, length = arrays_BL[0].shape[:2]
    chunk_length = max(1, min(chunk_length, length))
    chunks_of_row = -(-length // chunk_length)  # 0 where rows are empty; so no size below is left to be inferred

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, -length % chunk_length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, chunks_of_row, chunk_length, *x.shape[2:]), 1, 0)

    def joined(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(rows, chunks_of_row * chunk_length, *x.shape[3:])[:, :length]

    def body(sums: Any, chunk: tuple[Array, ...]) -> tuple[Any, Any]:
        chunk_sums, results = part(*chunk)
        return jax.tree.map(jnp.add, sums, chunk_sums), results

    chunks = tuple(split(x) for x in arrays_BL)
    shapes, _ = jax.eval_shape(part, *(jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in chunks))
    sums, results = jax.lax.scan(body, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), chunks)
    return sums, jax.tree.map(joined, results)


def map_logits(
    function: Callable[..., Any],
    hidden_BLD: Array,
    head_DV: Array,
    arrays_BL: tuple[Array, ...] = (),
    *,
    vocab_size: int,
    chunk_length: int = 32,
    weights_BL: Array | None = None,
) -> Any:
    """`function(logits, *arrays)` at every position, [B, L, ...], where only a chunk's logits exist at one time.

    Not meant to be differentiated: the backward pass would keep the logits (see `fused_sums`).

    Args:
      function: (float32 logits [B, chunk_length, V], chunks of the arrays) -> arrays [B, chunk_length, ...]. The logits
        of the vocabulary's padding are -1e30.
      hidden_BLD: states that the head reads.
      head_DV: LM head; products accumulate in float32.
      arrays_BL: what else the function reads at each position.
      vocab_size: real vocabulary entries; the rest of V is padding.
      chunk_length: positions of each row whose logits exist at one time.
      weights_BL: where 0, the states are replaced by zeros, so that a state that is not finite has no effect.

    Raises:
      ValueError: the head has fewer than `vocab_size` columns, or `vocab_size` or `chunk_length` is below 1.
    """
    check_vocabulary(vocab_size, head_DV=head_DV)
    head_DV = head_DV.astype(hidden_BLD.dtype)
    if weights_BL is not None:
        hidden_BLD = _cleared(hidden_BLD, weights_BL)

    def part(hidden: Array, *chunk: Array) -> tuple[tuple[()], Any]:
        return (), function(mask_padding(_logits(hidden, head_DV), vocab_size), *chunk)

    return over_chunks(part, (hidden_BLD, *arrays_BL), chunk_length)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def fused_sums(
    losses: LogitLosses,
    chunk_length: int,
    mesh: Mesh | None,
    hidden_BLD: Array,
    head_DV: Array,
    constants: tuple,
    arrays_BL: tuple[Array, ...],
) -> tuple[Array, Any]:
    """Sums of `losses` over chunks of logits; the first of `arrays_BL` are the loss weights.

    Differentiable in its first result, with respect to `hidden_BLD` and `head_DV`.
    """
    head_DV = whole_columns(head_DV, hidden_BLD, mesh)

    def part(hidden: Array, *rest: Array) -> tuple[Any, None]:
        loss, others, _ = losses(chunk_logits(hidden, head_DV, rest[0], mesh), constants, rest)
        return (loss, others), None

    return over_chunks(part, (hidden_BLD, *arrays_BL), chunk_length)[0]


def _fused_forward(
    losses: LogitLosses,
    chunk_length: int,
    mesh: Mesh | None,
    hidden_BLD: Array,
    head_DV: Array,
    constants: tuple,
    arrays_BL: tuple[Array, ...],
) -> tuple[tuple[Array, Any], tuple[Array, ...]]:
    """The sums; and the gradients of the first one, of the states [B, L, D] and of the head, with the dtypes to give.

    They stay in float32 until the backward pass has scaled them. Rounded to bfloat16 before it, or scaled by 1 / tokens
    in bfloat16, they would all be off by one common factor, of up to 0.4%.
    """
    dtypes = tuple(jnp.zeros(0, x.dtype) for x in (hidden_BLD, head_DV))
    shards = 1 if mesh is None else row_ways(mesh)
    head_DV = whole_columns(head_DV, hidden_BLD, mesh)

    def part(hidden: Array, *rest: Array) -> tuple[Any, Array]:
        logits = chunk_logits(hidden, head_DV, rest[0], mesh)
        loss, others, d_logits = losses(logits, constants, rest)
        d_logits = _padded(d_logits.astype(hidden.dtype), logits.shape[-1])
        d_hidden = jnp.einsum("blv,dv->bld", d_logits, head_DV, preferred_element_type=jnp.float32)
        # One partial sum for each group of rows that shares a device: no communication inside the loop.
        hidden_RBLD, d_logits_RBLV = (
            constrain(x.reshape(shards, len(x) // shards, *x.shape[1:]), mesh, ROW_AXES, None, None, axis)
            for x, axis in ((_cleared(hidden, rest[0]), None), (d_logits, "tensor"))
        )
        d_head = jnp.einsum("rbld,rblv->rdv", hidden_RBLD, d_logits_RBLV, preferred_element_type=jnp.float32)
        d_head = constrain(d_head, mesh, ROW_AXES, None, "tensor")
        return ((loss, others), d_head), _cleared(d_hidden, rest[0])

    (sums, d_head_RDV), d_hidden_BLD = over_chunks(part, (hidden_BLD, *arrays_BL), chunk_length)
    return sums, (d_hidden_BLD, jnp.sum(d_head_RDV, axis=0), *dtypes)


def _fused_backward(
    losses: LogitLosses, chunk_length: int, mesh: Mesh | None, residuals: tuple[Array, ...], cotangents: tuple
) -> tuple[Array, Array, None, None]:
    *gradients, of_hidden, of_head = residuals
    d_hidden, d_head = (gradient * cotangents[0] for gradient in gradients)
    return d_hidden.astype(of_hidden.dtype), d_head.astype(of_head.dtype), None, None


fused_sums.defvjp(_fused_forward, _fused_backward)


def chunk_logits(hidden_BLD: Array, head_DV: Array, weights_BL: Array, mesh: Mesh | None) -> Array:
    """hidden @ head in float32, [B, L, V], where the vocabulary lies; zero at tokens of weight 0."""
    return constrain(_logits(_cleared(hidden_BLD, weights_BL), head_DV), mesh, ROW_AXES, None, "tensor")


def whole_columns(head_DV: Array, hidden_BLD: Array, mesh: Mesh | None) -> Array:
    """The head in the states' dtype with every column whole: gathered once, before the loop over chunks."""
    return constrain(head_DV.astype(hidden_BLD.dtype), mesh, None, "tensor")


def _logits(hidden_BLD: Array, head_DV: Array) -> Array:
    return jnp.einsum("bld,dv->blv", hidden_BLD, head_DV, preferred_element_type=jnp.float32)


def _cleared(hidden_BLD: Array, weights_BL: Array) -> Array:
    """Zero at tokens of weight 0: a non-finite state there must not reach any gradient."""
    return jnp.where((weights_BL > 0)[..., None], hidden_BLD, jnp.zeros((), hidden_BLD.dtype))


def _padded(d_logits: Array, size: int) -> Array:
    """With zeros for the vocabulary's padding, where the gradient was formed without it."""
    missing = size - d_logits.shape[-1]
    return jnp.pad(d_logits, [*[(0, 0)] * (d_logits.ndim - 1), (0, missing)]) if missing else d_logits
