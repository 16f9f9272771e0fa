"""Attention without its matrices: rotary angles, masks and windows, kernels, within a row and to a cache.

Where the layers of a model differ (no rotary embedding, a sliding window), the number of the layer, which the scan over
layers counts, chooses between two angles or two masks.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from rtd_jax.models.computation import AttentionKernel, Computation
from rtd_jax.models.config import DecoderConfig


def rope_angles(config: DecoderConfig, positions_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the rotary angles, times the factor of yarn, float32, each [B, L, 1, E / 2]."""
    frequencies = config.rope.frequencies(config.head_dim)[None, None, None]
    angles = positions_BL.astype(jnp.float32)[..., None, None] * frequencies
    factor = config.rope.attention_factor if config.rope.kind == "yarn" else 1.0
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def layer_angles(
    config: DecoderConfig, angles: tuple[jax.Array, jax.Array], layer: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What `rotate` takes in one layer: no rotation in a layer without rotary embedding."""
    if not config.unrotated_layers:
        return angles
    cos, sin = angles
    is_unrotated = _is_of(config.unrotated_layers, config.layers, layer)
    return jnp.where(is_unrotated, 1.0, cos), jnp.where(is_unrotated, 0.0, sin)


def rotate(x_BLHE: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each pair (i, i + E / 2) by its angle (the half-split convention of the Hugging Face weights)."""
    cos, sin = angles
    first, second = jnp.split(x_BLHE.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return rotated.astype(x_BLHE.dtype)


def attention_kernel(wanted: AttentionKernel, length: int, head_dim: int, dtype: jnp.dtype) -> Literal["xla", "cudnn"]:
    """The implementation of jax.nn.dot_product_attention to use for queries of `length` tokens a row.

    JAX's own default is XLA's. "auto" uses cuDNN's kernel, which never materialises the [L, L] scores, wherever it can
    run: on NVIDIA GPUs of compute capability 8.0 or more, in bfloat16, for rows of even length, and for heads whose
    width is a multiple of 8 and at most 128. Rows of one token always use XLA's; with a cache, `attend_cached` computes
    them.
    """
    if length == 1 or wanted == "xla":
        return "xla"
    is_supported = dtype == jnp.bfloat16 and length % 2 == 0 and head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if wanted == "cudnn" or (is_supported and _on_nvidia_ampere()) else "xla"


def _on_nvidia_ampere() -> bool:
    if jax.default_backend() != "gpu":
        return False
    capability = str(getattr(jax.devices()[0], "compute_capability", "0"))  # "8.0"; AMD's are names such as gfx942
    return capability.split(".")[0].isdigit() and int(capability.split(".")[0]) >= 8


def attend_row(
    computation: Computation,
    layer: jax.Array,
    q_BLHE: jax.Array,
    k_BLGE: jax.Array,
    v_BLGE: jax.Array,
    mask: jax.Array | None,
) -> jax.Array:
    """Attention among the given tokens, in the window of the layer: where `mask` is True, or causal without a mask.

    Tokens of one chain are next to each other, so that their distance in the row is that of their positions.
    [B, L, H, E]
    """
    mask = _windowed(computation.config, layer, mask, q_BLHE.shape[1])
    kernel = attention_kernel(computation.attention, q_BLHE.shape[1], q_BLHE.shape[3], q_BLHE.dtype)
    return jax.nn.dot_product_attention(
        q_BLHE, k_BLGE, v_BLGE, mask=mask, is_causal=mask is None, implementation=kernel
    )


def _windowed(config: DecoderConfig, layer: jax.Array, mask: jax.Array | None, length: int) -> jax.Array | None:
    """The mask of one layer in rows of `length` tokens; as given where no window is shorter than the rows."""
    if config.window is None or config.window >= length:
        return mask
    apart_LL = jnp.arange(length)[:, None] - jnp.arange(length)[None]  # tokens from a key to the query
    is_near_LL = apart_LL < config.window
    if len(config.windowed_layers) < config.layers:
        is_near_LL |= ~_is_of(config.windowed_layers, config.layers, layer)
    return is_near_LL[None, None] & (apart_LL >= 0 if mask is None else mask)


def slots_seen(config: DecoderConfig, layer: jax.Array, positions_B: jax.Array, length: int) -> jax.Array:
    """Which of the first `length` slots of a cache a query at each position attends to in one layer. bool [B, L]"""
    apart_BL = positions_B[:, None] - jnp.arange(length)[None]  # tokens from a slot to the query
    seen_BL = apart_BL >= 0
    if config.window is None or config.window >= length:
        return seen_BL
    return seen_BL & ((apart_BL < config.window) | ~_is_of(config.windowed_layers, config.layers, layer))


def _is_of(chosen: tuple[int, ...], layers: int, layer: jax.Array) -> jax.Array:
    """Whether the layer of that number, which the scan counts, is one of those chosen."""
    return jnp.asarray(np.isin(np.arange(layers), chosen))[layer]


def attend_cached(q_BHE: jax.Array, k_BGLE: jax.Array, v_BGLE: jax.Array, seen_BL: jax.Array) -> jax.Array:
    """Attention of one query per row to the cached slots that it may see. [B, H, E]

    softmax(q k / sqrt(E)) v with scores in float32, as jax.nn.dot_product_attention computes it for another memory
    layout of keys and values.
    """
    batch, heads, head_dim = q_BHE.shape
    q_BGRE = q_BHE.reshape(batch, k_BGLE.shape[1], -1, head_dim)  # R: query heads of one key/value head
    scores_BGRL = jnp.einsum("BGRE,BGLE->BGRL", q_BGRE, k_BGLE, preferred_element_type=jnp.float32) / head_dim**0.5
    hidden = jnp.finfo(jnp.float32).min
    weights_BGRL = jax.nn.softmax(jnp.where(seen_BL[:, None, None], scores_BGRL, hidden), axis=-1)
    mixed_BGRE = jnp.einsum("BGRL,BGLE->BGRE", weights_BGRL.astype(v_BGLE.dtype), v_BGLE)
    return mixed_BGRE.reshape(batch, heads, head_dim)
