"""Llama and its kin in Flax NNX: RMSNorm, rotary grouped-query attention, SwiGLU; layers are stacked, run by one scan.

Kernels are laid out for `x @ kernel` with heads as their own axis, so nothing is transposed or repeated at run time:
q [D, H, E], k and v [D, G, E], o [H, E, D], gate and up [D, F], down [F, D]; stacked layers lead with N.
What sets a family apart (biases, norms of queries and keys, layers without rotary embedding or with a sliding window)
is in its config: a part that a model has not is not built, and where layers differ, the number of the layer, which the
scan counts, chooses.
Sources: Touvron et al. 2023 (arXiv:2302.13971), Llama 3 (arXiv:2407.21783), GQA (arXiv:2305.13245), Mistral
(arXiv:2310.06825), Qwen2 (arXiv:2407.10671), Qwen3 (arXiv:2505.09388), NoPE layers (arXiv:2501.18795).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from rtd_jax.models.adapters import AdapterSettings
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.quantized import ROUNDED, as_float
from rtd_jax.models.schemes import Scheme, fake_rounded, fake_rounded_layer
from rtd_jax.models.weights import EMBEDDING, ROWS, axis_sizes

# What the forward pass stores of a layer for the backward pass: with "none" everything, so that nothing is recomputed;
# with "full" the layer's input alone; with "dots" its input and the projections, but not the attention scores.
Remat = Literal["none", "dots", "full"]
REMAT_POLICIES: dict[Remat, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
AttentionKernel = Literal["auto", "xla", "cudnn"]


@dataclass(frozen=True)
class Computation:
    """The description of a model and how it is computed. Only the description changes the result by more than rounding.

    Raises:
      ValueError: an attribute has a value that does not exist.
    """

    config: DecoderConfig
    compute_dtype: str = "float32"  # of matrix products and hidden states: "float32" or "bfloat16"
    remat: Remat = "none"  # what the backward pass recomputes
    activation_sharding: NamedSharding | None = None  # of the [B, L, D] states between layers
    attention: AttentionKernel = "auto"  # implementation of jax.nn.dot_product_attention; see `attention_kernel`
    streamed: bool = False  # layers stay in host memory, and each is copied to the device when it runs
    quantization: Scheme | None = None  # compute with float weights as this would round them; gradients go through
    adapter: AdapterSettings | None = None  # beside frozen weights; the params then have two parts (see `adapters`)

    def __post_init__(self) -> None:
        if self.adapter is not None and (self.adapter.rank < 1 or self.quantization is not None):
            raise ValueError(
                f"adapter has rank {self.adapter.rank} and quantization is {self.quantization}; expected a rank from 1 "
                "and no quantization: the weights under an adapter are not trained"
            )
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat {self.remat!r} is not a policy; use one of {', '.join(REMAT_POLICIES)}")
        if self.attention not in get_args(AttentionKernel):
            raise ValueError(f"attention {self.attention!r} is not an implementation; use 'auto', 'xla' or 'cudnn'")
        if not jnp.issubdtype(jnp.dtype(self.compute_dtype), jnp.floating):
            raise ValueError(f"compute_dtype {self.compute_dtype!r} is not a float type; use 'float32' or 'bfloat16'")


class KVCache(NamedTuple):
    """The rotated keys and the values of every layer. A token's slot in the cache is its position.

    The slots of one head are next to each other in memory, because the products with a single query read them in that
    order. With the heads inside the slots, XLA's CPU compiler would transpose the whole cache for every token.
    """

    keys_NBGLE: jax.Array
    values_NBGLE: jax.Array


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


class LowRank(nnx.Module):
    """x A B alpha / rank: what an adapter adds to the product of x and one matrix."""

    def __init__(self, adapter: AdapterSettings, inputs: Sequence[int], outputs: Sequence[int], dtype: jnp.dtype):
        self.a = _zeros(dtype, (*inputs, adapter.rank))
        self.b = _zeros(dtype, (adapter.rank, *outputs))
        self.scale = adapter.scale

    def __call__(self, x: jax.Array) -> jax.Array:
        a, b = _weight(self.a, x.dtype), _weight(self.b, x.dtype)
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
        self.q = _zeros(dtype, (width, config.heads, head_dim))
        self.k = _zeros(dtype, (width, config.kv_heads, head_dim))
        self.v = _zeros(dtype, (width, config.kv_heads, head_dim))
        self.o = _zeros(dtype, (config.heads, head_dim, width))
        if config.qkv_bias:
            self.q_bias = _zeros(dtype, (config.heads, head_dim))
            self.k_bias = _zeros(dtype, (config.kv_heads, head_dim))
            self.v_bias = _zeros(dtype, (config.kv_heads, head_dim))
        if config.output_bias:
            self.o_bias = _zeros(dtype, (width,))
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
        q_BLHE = self.adapted("q", x_BLD, jnp.einsum("BLD,DHE->BLHE", x_BLD, _weight(self.q, dtype)))
        k_BLGE = self.adapted("k", x_BLD, jnp.einsum("BLD,DGE->BLGE", x_BLD, _weight(self.k, dtype)))
        v_BLGE = self.adapted("v", x_BLD, jnp.einsum("BLD,DGE->BLGE", x_BLD, _weight(self.v, dtype)))
        if config.qkv_bias:
            q_BLHE = q_BLHE + _weight(self.q_bias, dtype)
            k_BLGE = k_BLGE + _weight(self.k_bias, dtype)
            v_BLGE = v_BLGE + _weight(self.v_bias, dtype)
        if config.qk_norm:
            q_BLHE, k_BLGE = self.q_norm(q_BLHE), self.k_norm(k_BLGE)
        mixed_BLHE, cache = attend(rotate(q_BLHE, angles), rotate(k_BLGE, angles), v_BLGE)
        product_BLD = jnp.einsum("BLHE,HED->BLD", mixed_BLHE, _weight(self.o, dtype))
        out_BLD = self.adapted("o", mixed_BLHE, product_BLD)
        if config.output_bias:
            out_BLD = out_BLD + _weight(self.o_bias, dtype)
        return out_BLD, cache, mixed_BLHE


class SwiGLU(Adapted):
    """(silu(x gate) * (x up)) down."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, adapter: AdapterSettings | None):
        self.gate = _zeros(dtype, (config.width, config.mlp_width))
        self.up = _zeros(dtype, (config.width, config.mlp_width))
        self.down = _zeros(dtype, (config.mlp_width, config.width))
        self.has_bias = config.mlp_bias
        if config.mlp_bias:
            self.gate_bias = _zeros(dtype, (config.mlp_width,))
            self.up_bias = _zeros(dtype, (config.mlp_width,))
            self.down_bias = _zeros(dtype, (config.width,))
        self.add_adapters("mlp", config, adapter, dtype)

    def __call__(self, x_BLD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The output [B, L, D], and what `down` reads, of each token [B * L, F]."""
        dtype = x_BLD.dtype
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])  # on one token axis XLA's backward pass is twice as fast on CPUs
        gate_TF = self.adapted("gate", x_TD, x_TD @ _weight(self.gate, dtype))
        up_TF = self.adapted("up", x_TD, x_TD @ _weight(self.up, dtype))
        if self.has_bias:
            gate_TF, up_TF = gate_TF + _weight(self.gate_bias, dtype), up_TF + _weight(self.up_bias, dtype)
        neurons_TF = jax.nn.silu(gate_TF) * up_TF
        change_TD = self.adapted("down", neurons_TF, neurons_TF @ _weight(self.down, dtype))
        if self.has_bias:
            change_TD = change_TD + _weight(self.down_bias, dtype)
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


class Decoder(nnx.Module):
    """The network up to the states that the head reads. Its arrays are zeros; DecoderModel supplies weights."""

    def __init__(self, computation: Computation, dtype: jnp.dtype):
        self.computation, config = computation, computation.config
        self.embedding = _zeros(dtype, (config.vocab_size, config.width))
        stacked = nnx.vmap(lambda _: Block(config, dtype, computation.adapter), in_axes=0, out_axes=0)
        self.layers = stacked(jnp.arange(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps, dtype)
        if not config.tied_embeddings:
            self.head = _zeros(dtype, (config.width, config.vocab_size))

    def __call__(
        self, tokens_BL: jax.Array, positions_BL: jax.Array, mask: jax.Array | None, kept_layers: tuple[int, ...] = ()
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Final normed states [B, L, D], and the residual stream before layer i for each i of `kept_layers`."""
        layers, run_layer = self._split_layers(positions_BL)

        def layer(x_BLD, index, weights):
            def attend(q_BLHE, k_BLGE, v_BLGE):
                return attend_row(self.computation, index, q_BLHE, k_BLGE, v_BLGE, mask), None

            return run_layer(x_BLD, index, weights, attend)[0]

        adapter, policy = self.computation.adapter, REMAT_POLICIES[self.computation.remat]
        if policy is None and adapter is not None and adapter.base_dtype in ROUNDED:
            # Stored for the backward pass, the floats of all frozen layers would take the room that integers save.
            policy = jax.checkpoint_policies.dots_saveable
        if policy is not None:
            # Inside a scan XLA cannot merge the recomputation with the first computation anyway, so the barriers that
            # prevent_cse adds would only cost time.
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)

        def body(carry, scanned):
            x_BLD, kept = carry
            index, weights = scanned
            # The wanted states are selected into the carry, outside the checkpoint. So the scan does not store the
            # states of all N layers, and the backward pass stores nothing more.
            kept = tuple(jnp.where(index == wanted, x_BLD, old) for wanted, old in zip(kept_layers, kept, strict=True))
            return (layer(x_BLD, index, weights), kept), None

        x_BLD = self._embed(tokens_BL)
        kept = tuple(jnp.zeros_like(x_BLD) for _ in kept_layers)
        (x_BLD, kept), _ = jax.lax.scan(body, (x_BLD, kept), (jnp.arange(self.computation.config.layers), layers))
        return self.norm(x_BLD), kept

    def prefill(self, tokens_BL: jax.Array, positions_BL: jax.Array, last_B: jax.Array) -> tuple[jax.Array, KVCache]:
        """Final normed state at index `last_B` of each row [B, D], and the cache of all L tokens."""
        layers, run_layer = self._split_layers(positions_BL)

        def body(x_BLD, scanned):
            index, weights = scanned

            def attend(q_BLHE, k_BLGE, v_BLGE):
                new = KVCache(*(jnp.swapaxes(x, 1, 2) for x in (k_BLGE, v_BLGE)))
                return attend_row(self.computation, index, q_BLHE, k_BLGE, v_BLGE, None), new

            return run_layer(x_BLD, index, weights, attend)

        numbers = jnp.arange(self.computation.config.layers)
        x_BLD, cache = jax.lax.scan(body, self._embed(tokens_BL), (numbers, layers))
        last_BD = jnp.take_along_axis(x_BLD, last_B[:, None, None], axis=1)[:, 0]
        return self.norm(last_BD), cache

    def decode(
        self, cache: KVCache, tokens_B: jax.Array, positions_B: jax.Array, length: int
    ) -> tuple[jax.Array, KVCache]:
        """Final normed state of one more token per row [B, D], and the cache with that token in slot `positions_B`.

        It attends to the first `length` slots, in the window of each layer.
        """
        config = self.computation.config
        layers, run_layer = self._split_layers(positions_B[:, None])
        apart_BL = positions_B[:, None] - jnp.arange(length)[None]  # tokens from a slot to the query
        rows_B = jnp.arange(tokens_B.shape[0])

        def body(carry, scanned):
            # The cache is in the carry, not in the scanned inputs, so that only its new slots are written.
            x_B1D, cache = carry
            index, weights = scanned

            def attend(q_B1HE, k_B1GE, v_B1GE):
                new = KVCache(k_B1GE[:, 0], v_B1GE[:, 0])
                places = (index, rows_B, slice(None), positions_B)
                stored = jax.tree.map(lambda x, y: x.at[places].set(y.astype(x.dtype)), cache, new)
                k_BGLE, v_BGLE = (
                    jax.lax.dynamic_slice(x, (index, 0, 0, 0, 0), (1, *x.shape[1:3], length, x.shape[4]))[0]
                    for x in stored
                )
                k_BGLE, v_BGLE = k_BGLE.astype(q_B1HE.dtype), v_BGLE.astype(q_B1HE.dtype)
                seen_BL = apart_BL >= 0
                if config.window is not None and config.window < length:
                    is_windowed = _is_of(config.windowed_layers, config.layers, index)
                    seen_BL &= (apart_BL < config.window) | ~is_windowed
                return attend_cached(q_B1HE[:, 0], k_BGLE, v_BGLE, seen_BL)[:, None], stored

            return run_layer(x_B1D, index, weights, attend), None

        carry = (self._embed(tokens_B[:, None]), cache)
        (x_B1D, cache), _ = jax.lax.scan(body, carry, (jnp.arange(config.layers), layers))
        return self.norm(x_B1D[:, 0]), cache

    def _split_layers(self, positions_BL: jax.Array) -> tuple[nnx.State, Callable]:
        """The stacked weights of the layers, and the function that runs one of them.

        (x, the layer's number, its weights, attend) -> (x after the layer, its cache).
        """
        config = self.computation.config
        angles = rope_angles(config, positions_BL)
        graphdef, layers = nnx.split(self.layers)
        scheme = self.computation.quantization

        def run_layer(x_BLD: jax.Array, index: jax.Array, weights: nnx.State, attend: Attend) -> tuple[jax.Array, Any]:
            if self.computation.streamed:
                weights = jax.device_put(weights, jax.memory.Space.Device)
            if scheme is not None:
                values = fake_rounded_layer(nnx.to_pure_dict(weights), scheme)
                nnx.replace_by_pure_dict(weights, values)
            own_angles = layer_angles(config, angles, index)
            x_BLD, cache, _ = nnx.merge(graphdef, weights)(x_BLD, own_angles, attend)
            return self._constrain(x_BLD), cache

        return layers, run_layer

    def _embed(self, tokens_BL: jax.Array) -> jax.Array:
        # Rows are looked up before they are converted to floats. An int8 table has two parts: values and scales.
        table = self.embedding.get_value()
        if self.computation.quantization is not None:
            table = fake_rounded(table, EMBEDDING, self.computation.quantization)
        rows = jax.tree.map(lambda part: part[tokens_BL], table)
        return self._constrain(as_float(rows, self.computation.compute_dtype))

    def _constrain(self, x_BLD: jax.Array) -> jax.Array:
        sharding = self.computation.activation_sharding
        return x_BLD if sharding is None else jax.lax.with_sharding_constraint(x_BLD, sharding)


def _weight(param: nnx.Param, dtype: jnp.dtype) -> jax.Array:
    return as_float(param.get_value(), dtype)


def _zeros(dtype: jnp.dtype, shape: tuple[int, ...]) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, dtype))
