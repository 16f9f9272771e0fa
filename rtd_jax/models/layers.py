"""The parts of a layer in Flax NNX: RMSNorm, the matrices around attention, SwiGLU, and low-rank adapters beside them.

Kernels are laid out for `x @ kernel` with heads as their own axis, so nothing is transposed or repeated at run time:
q [D, H, E], k and v [D, G, E], o [H, E, D], gate and up [D, F], down [F, D]. A part that a model has not is not built.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from rtd_jax.models.adapters import AdapterSettings
from rtd_jax.models.attention import rotate
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.quantized import as_float
from rtd_jax.models.weights import ROWS, axis_sizes

# The attention of one layer: takes rotated queries [B, L, H, E], and rotated keys and values [B, L, G, E]; returns the
# weighted means of the values [B, L, H, E], and the layer's cache, or None where none is kept.
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class LayerInputs(NamedTuple):
    """What the matrices of one layer read. Under jit it costs nothing where it is not used."""

    attention_BLD: jax.Array  # read by q, k and v: normed states
    mixed_BLHE: jax.Array  # read by o: weighted means of the values
    mlp_BLD: jax.Array  # read by gate and up: normed states
    neurons_BLF: jax.Array  # read by down: silu(gate) * up


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale, in float32 whatever the dtype of x."""

    def __init__(self, width: int, eps: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x_f32 = x.astype(jnp.float32)
        normed = x_f32 * jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + self.eps)
        scale = jnp.expand_dims(self.scale[...].astype(jnp.float32), tuple(range(x.ndim - 1)))
        return (normed * scale).astype(x.dtype)


class LowRank(nnx.Module):
    """x A B alpha / rank: what an adapter adds to the product of x and one matrix."""

    def __init__(self, adapter: AdapterSettings, inputs: Sequence[int], outputs: Sequence[int], dtype: jnp.dtype):
        self.a = zeros(dtype, (*inputs, adapter.rank))
        self.b = zeros(dtype, (adapter.rank, *outputs))
        self.scale = adapter.scale

    def __call__(self, x: jax.Array) -> jax.Array:
        a, b = weight(self.a, x.dtype), weight(self.b, x.dtype)
        return jnp.tensordot(self.scale * jnp.tensordot(x, a, a.ndim - 1), b, 1)


class Adapted(nnx.Module):
    """A module with matrices as its attributes, which may each have an adapter."""

    def add_adapters(self, kind: str, config: DecoderConfig, adapter: AdapterSettings | None, dtype: jnp.dtype) -> None:
        """Makes an attribute such as `q_adapter` for each of the adapter's matrices in layers.<kind>."""
        if adapter is None:
            return
        sizes = axis_sizes(config)
        for name in adapter.matrices:
            row = ROWS.get(("layers", kind, name))
            if row is not None:
                outputs, inputs = ([sizes[axis] for axis in group] for group in row.hf_axes)
                setattr(self, f"{name}_adapter", LowRank(adapter, inputs, outputs, dtype))

    def adapted(self, name: str, x: jax.Array, product: jax.Array) -> jax.Array:
        """The product of x and a matrix, with what the matrix's adapter adds to it; as it is without one."""
        own = getattr(self, f"{name}_adapter", None)
        return product if own is None else product + own(x)


class Attention(Adapted):
    """Grouped-query attention: projections around `attend`, which attends within the row or to a cache."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, adapter: AdapterSettings | None):
        width, head_dim = config.width, config.head_dim
        self.q = zeros(dtype, (width, config.heads, head_dim))
        self.k = zeros(dtype, (width, config.kv_heads, head_dim))
        self.v = zeros(dtype, (width, config.kv_heads, head_dim))
        self.o = zeros(dtype, (config.heads, head_dim, width))
        if config.qkv_bias:
            self.q_bias = zeros(dtype, (config.heads, head_dim))
            self.k_bias = zeros(dtype, (config.kv_heads, head_dim))
            self.v_bias = zeros(dtype, (config.kv_heads, head_dim))
        if config.output_bias:
            self.o_bias = zeros(dtype, (width,))
        if config.qk_norm:
            self.q_norm = RMSNorm(head_dim, config.norm_eps, dtype)
            self.k_norm = RMSNorm(head_dim, config.norm_eps, dtype)
        self.add_adapters("attention", config, adapter, dtype)
        self.config = config

    def __call__(
        self, x_BLD: jax.Array, angles: tuple[jax.Array, jax.Array], attend: Attend
    ) -> tuple[jax.Array, Any, jax.Array]:
        """The output [B, L, D], the layer's cache, and what `o` reads [B, L, H, E]."""
        dtype, config = x_BLD.dtype, self.config
        q_BLHE = self.adapted("q", x_BLD, jnp.einsum("BLD,DHE->BLHE", x_BLD, weight(self.q, dtype)))
        k_BLGE = self.adapted("k", x_BLD, jnp.einsum("BLD,DGE->BLGE", x_BLD, weight(self.k, dtype)))
        v_BLGE = self.adapted("v", x_BLD, jnp.einsum("BLD,DGE->BLGE", x_BLD, weight(self.v, dtype)))
        if config.qkv_bias:
            q_BLHE = q_BLHE + weight(self.q_bias, dtype)
            k_BLGE = k_BLGE + weight(self.k_bias, dtype)
            v_BLGE = v_BLGE + weight(self.v_bias, dtype)
        if config.qk_norm:
            q_BLHE, k_BLGE = self.q_norm(q_BLHE), self.k_norm(k_BLGE)
        mixed_BLHE, cache = attend(rotate(q_BLHE, angles), rotate(k_BLGE, angles), v_BLGE)
        product_BLD = jnp.einsum("BLHE,HED->BLD", mixed_BLHE, weight(self.o, dtype))
        out_BLD = self.adapted("o", mixed_BLHE, product_BLD)
        if config.output_bias:
            out_BLD = out_BLD + weight(self.o_bias, dtype)
        return out_BLD, cache, mixed_BLHE


class SwiGLU(Adapted):
    """(silu(x gate) * (x up)) down."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, adapter: AdapterSettings | None):
        self.gate = zeros(dtype, (config.width, config.mlp_width))
        self.up = zeros(dtype, (config.width, config.mlp_width))
        self.down = zeros(dtype, (config.mlp_width, config.width))
        self.has_bias = config.mlp_bias
        if config.mlp_bias:
            self.gate_bias = zeros(dtype, (config.mlp_width,))
            self.up_bias = zeros(dtype, (config.mlp_width,))
            self.down_bias = zeros(dtype, (config.width,))
        self.add_adapters("mlp", config, adapter, dtype)

    def __call__(self, x_BLD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The output [B, L, D], and what `down` reads, of each token [B * L, F]."""
        dtype = x_BLD.dtype
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])  # on one token axis XLA's backward pass is twice as fast on CPUs
        gate_TF = self.adapted("gate", x_TD, x_TD @ weight(self.gate, dtype))
        up_TF = self.adapted("up", x_TD, x_TD @ weight(self.up, dtype))
        if self.has_bias:
            gate_TF, up_TF = gate_TF + weight(self.gate_bias, dtype), up_TF + weight(self.up_bias, dtype)
        neurons_TF = jax.nn.silu(gate_TF) * up_TF
        change_TD = self.adapted("down", neurons_TF, neurons_TF @ weight(self.down, dtype))
        if self.has_bias:
            change_TD = change_TD + weight(self.down_bias, dtype)
        return change_TD.reshape(x_BLD.shape), neurons_TF


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, adapter: AdapterSettings | None = None):
        self.attention_norm = RMSNorm(config.width, config.norm_eps, dtype)
        self.attention = Attention(config, dtype, adapter)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps, dtype)
        self.mlp = SwiGLU(config, dtype, adapter)

    def __call__(
        self, x_BLD: jax.Array, angles: tuple[jax.Array, jax.Array], attend: Attend
    ) -> tuple[jax.Array, Any, LayerInputs]:
        """The states after the layer [B, L, D], its cache, and what its matrices read."""
        with jax.named_scope("attention"):
            attention_BLD = self.attention_norm(x_BLD)
            mixed_BLD, cache, mixed_BLHE = self.attention(attention_BLD, angles, attend)
        x_BLD = x_BLD + mixed_BLD
        with jax.named_scope("mlp"):
            mlp_BLD = self.mlp_norm(x_BLD)
            change_BLD, neurons_TF = self.mlp(mlp_BLD)
            x_BLD = x_BLD + change_BLD
        neurons_BLF = neurons_TF.reshape(*x_BLD.shape[:-1], -1)
        return x_BLD, cache, LayerInputs(attention_BLD, mixed_BLHE, mlp_BLD, neurons_BLF)


def weight(param: nnx.Param, dtype: jnp.dtype) -> jax.Array:
    return as_float(param.get_value(), dtype)


def zeros(dtype: jnp.dtype, shape: tuple[int, ...]) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, dtype))
