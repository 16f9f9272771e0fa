"""Llama and its kin in Flax NNX: RMSNorm, rotary grouped-query attention, SwiGLU; layers are stacked, run by one scan.

The arrays of all layers are stacked, with N in front. What sets a family apart (biases, norms of queries and keys,
layers without rotary embedding or with a sliding window) is in its config; `layers` and `attention` read it.
Sources: Touvron et al. 2023 (arXiv:2302.13971), Llama 3 (arXiv:2407.21783), GQA (arXiv:2305.13245), Mistral
(arXiv:2310.06825), Qwen2 (arXiv:2407.10671), Qwen3 (arXiv:2505.09388), NoPE layers (arXiv:2501.18795).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from rtd_jax.models.attention import attend_cached, attend_row, layer_angles, rope_angles, slots_seen
from rtd_jax.models.computation import REMAT_POLICIES, Computation
from rtd_jax.models.layers import Attend, Block, RMSNorm, zeros
from rtd_jax.models.quantized import ROUNDED, as_float
from rtd_jax.models.schemes import fake_rounded, fake_rounded_layer
from rtd_jax.models.weights import EMBEDDING


class KVCache(NamedTuple):
    """The rotated keys and the values of every layer. A token's slot in the cache is its position.

    The slots of one head are next to each other in memory, because the products with a single query read them in that
    order. With the heads inside the slots, XLA's CPU compiler would transpose the whole cache for every token.
    """

    keys_NBGLE: jax.Array
    values_NBGLE: jax.Array


class Decoder(nnx.Module):
    """The network up to the states that the head reads. Its arrays are zeros; DecoderModel supplies weights."""

    def __init__(self, computation: Computation, dtype: jnp.dtype):
        self.computation, config = computation, computation.config
        self.embedding = zeros(dtype, (config.vocab_size, config.width))
        stacked = nnx.vmap(lambda _: Block(config, dtype, computation.adapter), in_axes=0, out_axes=0)
        self.layers = stacked(jnp.arange(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps, dtype)
        if not config.tied_embeddings:
            self.head = zeros(dtype, (config.width, config.vocab_size))

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
                seen_BL = slots_seen(config, index, positions_B, length)
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
