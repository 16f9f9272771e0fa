"""Sums of losses on logits, a chunk of tokens at a time, with the LM head applied inside.

While a chunk's logits exist, their gradient is formed as well and carried on to the states and the head: the backward
pass only scales what is there. What a loss has to give is its value and its gradient with respect to the logits.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rtd_jax.base.sharding import ROW_AXES, constrain, row_ways
from rtd_jax.base.types import Array

# (logits, constants, chunk of arrays) -> (sum of losses, other sums, gradient of the first with respect to the logits)
LogitLosses = Callable[[Array, tuple, tuple], tuple[Array, Any, Array]]


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

    Differentiable in its first result, with respect to `hidden_BLD` and `head_DV`. Chunks run along L and keep B whole,
    so that a batch sharded over rows stays where it is.
    """
    head_DV = whole_columns(head_DV, hidden_BLD, mesh)

    def part(hidden: Array, *rest: Array) -> tuple[Any, None]:
        loss, others, _ = losses(chunk_logits(hidden, head_DV, rest[0], mesh), constants, rest)
        return (loss, others), None

    return _sum_over(part, _chunks((hidden_BLD, *arrays_BL), chunk_length))[0]


def _fused_forward(
    losses: LogitLosses,
    chunk_length: int,
    mesh: Mesh | None,
    hidden_BLD: Array,
    head_DV: Array,
    constants: tuple,
    arrays_BL: tuple[Array, ...],
) -> tuple[tuple[Array, Any], tuple[Array, Array]]:
    """The sums, and the gradients of the first one: of the states [B, L, D], and of the head."""
    length, head_dtype = hidden_BLD.shape[1], head_DV.dtype
    shards = 1 if mesh is None else row_ways(mesh)
    head_DV = whole_columns(head_DV, hidden_BLD, mesh)

    def part(hidden: Array, *rest: Array) -> tuple[Any, Array]:
        logits = chunk_logits(hidden, head_DV, rest[0], mesh)
        loss, others, d_logits = losses(logits, constants, rest)
        d_logits = _padded(d_logits.astype(hidden.dtype), logits.shape[-1])
        d_hidden = jnp.einsum("blv,dv->bld", d_logits, head_DV, preferred_element_type=jnp.float32)
        # One partial sum for each group of rows that shares a device: no communication inside the loop.
        hidden_RBLD, d_logits_RBLV = (
            constrain(x.reshape(shards, -1, *x.shape[1:]), mesh, ROW_AXES, None, None, axis)
            for x, axis in ((_cleared(hidden, rest[0]), None), (d_logits, "tensor"))
        )
        d_head = jnp.einsum("rbld,rblv->rdv", hidden_RBLD, d_logits_RBLV, preferred_element_type=jnp.float32)
        d_head = constrain(d_head, mesh, ROW_AXES, None, "tensor")
        return ((loss, others), d_head), _cleared(d_hidden.astype(hidden.dtype), rest[0])

    (sums, d_head_RDV), d_hidden = _sum_over(part, _chunks((hidden_BLD, *arrays_BL), chunk_length))
    d_hidden_BLD = jnp.moveaxis(d_hidden, 0, 1).reshape(hidden_BLD.shape[0], -1, hidden_BLD.shape[2])[:, :length]
    return sums, (d_hidden_BLD, jnp.sum(d_head_RDV, axis=0).astype(head_dtype))


def _fused_backward(
    losses: LogitLosses, chunk_length: int, mesh: Mesh | None, gradients: tuple[Array, Array], cotangents: tuple
) -> tuple[Array, Array, None, None]:
    scale = cotangents[0]
    d_hidden, d_head = (gradient * scale.astype(gradient.dtype) for gradient in gradients)
    return d_hidden, d_head, None, None


fused_sums.defvjp(_fused_forward, _fused_backward)


def chunk_logits(hidden_BLD: Array, head_DV: Array, weights_BL: Array, mesh: Mesh | None) -> Array:
    """hidden @ head in float32, [B, L, V], where the vocabulary lies; zero at tokens of weight 0."""
    logits_BLV = jnp.einsum(
        "bld,dv->blv", _cleared(hidden_BLD, weights_BL), head_DV, preferred_element_type=jnp.float32
    )
    return constrain(logits_BLV, mesh, ROW_AXES, None, "tensor")


def whole_columns(head_DV: Array, hidden_BLD: Array, mesh: Mesh | None) -> Array:
    """The head in the states' dtype with every column whole: gathered once, before the loop over chunks."""
    return constrain(head_DV.astype(hidden_BLD.dtype), mesh, None, "tensor")


def _cleared(hidden_BLD: Array, weights_BL: Array) -> Array:
    """Zero at tokens of weight 0: a non-finite state there must not reach any gradient."""
    return jnp.where((weights_BL > 0)[..., None], hidden_BLD, jnp.zeros((), hidden_BLD.dtype))


def _chunks(arrays_BL: tuple[Array, ...], chunk_length: int) -> tuple[Array, ...]:
    """[B, L, ...] -> [L / chunk, B, chunk, ...], padded with zeros (tokens of weight 0) to whole chunks."""
    length = arrays_BL[0].shape[1]
    chunk_length = min(chunk_length, length)
    padding = -length % chunk_length

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk_length, *x.shape[2:]), 1, 0)

    return tuple(split(x) for x in arrays_BL)


def _sum_over(part: Callable[..., tuple[Any, Any]], chunks: tuple[Array, ...]) -> tuple[Any, Any]:
    """Sums the first result of `part` over chunks, and stacks the second."""
    shapes, _ = jax.eval_shape(part, *(jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in chunks))

    def body(sums: Any, chunk: tuple[Array, ...]) -> tuple[Any, Any]:
        own, output = part(*chunk)
        return jax.tree.map(jnp.add, sums, own), output

    return jax.lax.scan(body, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), chunks)


def _padded(d_logits: Array, size: int) -> Array:
    """With zeros for the vocabulary's padding, where the gradient was formed without it."""
    missing = size - d_logits.shape[-1]
    return jnp.pad(d_logits, [*[(0, 0)] * (d_logits.ndim - 1), (0, missing)]) if missing else d_logits
