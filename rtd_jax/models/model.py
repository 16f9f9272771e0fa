"""The public interface of a model: pure functions of its params, as methods of a hashable description."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from qwix import QArray

from rtd_jax.base.types import Array, Params
from rtd_jax.models.adapters import frozen, init_adapter, merged, with_adapter
from rtd_jax.models.computation import Computation
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.decoder import Decoder, KVCache
from rtd_jax.models.quantized import INT8, as_float, quantize_params
from rtd_jax.models.schemes import Scheme, as_params, fake_rounded, rounded
from rtd_jax.models.weights import ADAPTER, BASE, EMBEDDING, HEAD, is_bias, is_norm


@dataclass(frozen=True)
class DecoderModel(Computation):
    """A decoder without its weights. Hashable: pass it to jit as a static argument, and the params as a traced one."""

    def init(self, key: jax.Array, dtype: str = "float32") -> Params:
        """Random params: normal with standard deviation `config.init_std`, norms at one.

        With an adapter, the base is random in `adapter.base_dtype`, and the adapter as it begins, in float32.
        """
        if self.adapter is not None:
            base_key, adapter_key = jax.random.split(key)
            base = frozen(self._without_adapter.init(base_key), self.adapter.base_dtype)
            return {BASE: base, ADAPTER: init_adapter(self.adapter, self.config, adapter_key)}
        return _random_params(self, dtype, key)

    def abstract_params(self, dtype: str = "float32") -> Params:
        """Shapes and dtypes of the params, as jax.ShapeDtypeStruct leaves; allocates nothing.

        With "int8", matrices are `QArray`s and norms are bfloat16. With an adapter they are those of `init`.
        """
        if self.adapter is not None:
            return jax.eval_shape(self.init, jax.random.key(0))
        if dtype == INT8:
            return jax.eval_shape(quantize_params, self.abstract_params("bfloat16"))
        return nnx.to_pure_dict(_abstract(self, dtype)[1])

    def hidden(
        self,
        params: Params,
        tokens_BL: Array,
        positions_BL: Array,
        chain_ids_BL: Array | None,
        *,
        layers: Sequence[int] = (),
    ):
        """States that the head reads (after the last RMSNorm), [B, L, D] in `compute_dtype`.

        A token attends to itself and earlier tokens of the same chain id; positions give the rotary angles. Without ids
        (`Batch.attention_ids_BL`) it attends to all earlier tokens of its row. No mask is formed then, and a flash
        kernel skips what lies above the diagonal.
        With `layers`, returns (states, tuple of the hidden states asked for), counted as `DecoderConfig.layer_index`
        counts them: 0 the embeddings, i the output of layer i, -1 the final normed states.

        Raises:
          ValueError: a layer does not exist, or rows are longer than the rotary embedding can be computed for.
        """
        given = [tokens_BL, positions_BL, *([] if chain_ids_BL is None else [chain_ids_BL])]
        chex.assert_rank(given, 2)
        chex.assert_equal_shape(given)
        chex.assert_type(given, int)
        self._check_length(tokens_BL.shape[1])
        mask = None if chain_ids_BL is None else chain_mask(chain_ids_BL)
        count = self.config.layers
        wanted = [self.config.layer_index(layer) for layer in layers]
        inner = tuple(sorted({layer for layer in wanted if layer < count}))
        final_BLD, kept = self._module(params)(jnp.asarray(tokens_BL), jnp.asarray(positions_BL), mask, inner)
        if not layers:
            return final_BLD
        return final_BLD, tuple(final_BLD if layer == count else kept[inner.index(layer)] for layer in wanted)

    def head(self, params: Params) -> jax.Array:
        """The matrix from hidden states to logits, [D, V], in the dtype of the params (of int8: `compute_dtype`)."""
        params = params if self.adapter is None else params[BASE]
        head = params["embedding"] if self.config.tied_embeddings else params["head"]
        if self.quantization is not None:
            head = fake_rounded(head, EMBEDDING if self.config.tied_embeddings else HEAD, self.quantization)
        if isinstance(head, QArray):
            head = as_float(head, self.compute_dtype)
        return head.T if self.config.tied_embeddings else head

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """hidden @ head, float32 [..., V]. For a few states in evaluation; in training the loss applies the head."""
        head_DV = self.head(params).astype(hidden.dtype)
        return jnp.matmul(hidden, head_DV, preferred_element_type=jnp.float32)

    def deployed(self, params: Params) -> tuple["DecoderModel", Params]:
        """The model without its `quantization` or `adapter`, and params with which it computes the same.

        They are rounded, or merged with the adapter, once for all uses. Traceable.
        """
        if self.adapter is not None:
            return self._without_adapter, merged(params, self.adapter, self.compute_dtype)
        if self.quantization is None:
            return self, params
        return dataclasses.replace(self, quantization=None), _rounded_once(params, self.config, self.quantization)

    def prefill(
        self, params: Params, tokens_BL: Array, lengths_B: Array, cache_length: int
    ) -> tuple[jax.Array, KVCache]:
        """Reads right-padded prompts: (final normed state at each row's last prompt token [B, D], cache).

        `lengths_B` is the number of tokens of each prompt, at least 1. The cache has entries for padding too; `decode`
        overwrites each of them before any query can see it.

        Raises:
          ValueError: the prompts do not fit `cache_length` (tokens), or it is longer than the rotary embedding can be
            computed for.
        """
        chex.assert_rank([tokens_BL, lengths_B], [2, 1])
        chex.assert_equal_shape_prefix([tokens_BL, lengths_B], 1)
        length = tokens_BL.shape[1]
        if cache_length < length:
            raise ValueError(
                f"cache_length {cache_length} is shorter than the prompts' {length} tokens; make it larger"
            )
        self._check_length(cache_length)
        positions_BL = jnp.broadcast_to(jnp.arange(length), tokens_BL.shape)
        hidden_BD, cache = self._module(params).prefill(
            jnp.asarray(tokens_BL), positions_BL, jnp.asarray(lengths_B) - 1
        )
        padding = [(0, 0), (0, 0), (0, 0), (0, cache_length - length), (0, 0)]
        return hidden_BD, jax.tree.map(lambda x: jnp.pad(x, padding), cache)

    def decode(
        self, params: Params, cache: KVCache, tokens_B: Array, positions_B: Array, length: int | None = None
    ) -> tuple[jax.Array, KVCache]:
        """Reads one more token per row, at `positions_B` (from 0): (final normed state [B, D], cache).

        A position beyond the cache is not stored, and nothing says so: make the cache long enough for the prompt and
        all new tokens. With `length`, a static number above all positions that matter, only the cache's first `length`
        slots are read, which saves time.
        """
        chex.assert_rank([tokens_B, positions_B], 1)
        chex.assert_equal_shape([tokens_B, positions_B])
        length = cache.keys_NBGLE.shape[3] if length is None else length
        return self._module(params).decode(cache, jnp.asarray(tokens_B), jnp.asarray(positions_B), length)

    def _check_length(self, length: int) -> None:
        if length > self.config.rope.longest_row:
            raise ValueError(
                f"rows of {length} tokens: this model's rotary embedding is 'dynamic', whose angles change with the "
                f"length of a text beyond {self.config.rope.longest_row:,} tokens; use shorter rows"
            )

    @property
    def _without_adapter(self) -> "DecoderModel":
        return dataclasses.replace(self, adapter=None)

    def _module(self, params: Params) -> Decoder:
        params = params if self.adapter is None else with_adapter(params)
        return nnx.merge(_abstract(self, "float32")[0], params)


def chain_mask(chain_ids_BL: Array) -> jax.Array:
    """Where a query may attend: same chain, not later; padding to padding, so no softmax is empty. [B, 1, L, L]."""
    ids_BL = jnp.asarray(chain_ids_BL)
    length = ids_BL.shape[1]
    same_BLL = ids_BL[:, :, None] == ids_BL[:, None, :]
    return (same_BLL & jnp.tri(length, dtype=bool)[None])[:, None]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _rounded_once(params: Params, config: DecoderConfig, scheme: Scheme) -> Params:
    return as_params(rounded(params, scheme), config)


@functools.lru_cache(maxsize=64)
def _abstract(model: DecoderModel, dtype: str) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Decoder(model, jnp.dtype(dtype))))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _random_params(model: DecoderModel, dtype: str, key: jax.Array) -> Params:
    layers_key, rest_key = jax.random.split(key)
    rest = model.abstract_params(dtype)
    layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), rest.pop("layers"))
    draw = functools.partial(_random_arrays, model.config.init_std)
    layers = jax.lax.map(lambda key: draw(layer, key), jax.random.split(layers_key, model.config.layers))
    return {**draw(rest, rest_key), "layers": layers}


def _random_arrays(std: float, abstract: Params, key: jax.Array) -> Params:
    """Normal matrices, norms at one and biases at zero.

    All are cut from one draw: XLA takes ten seconds to compile a generator per matrix.
    """
    shapes = dict(sorted(flatten_dict(abstract).items()))
    matrices = {path: x for path, x in shapes.items() if not is_norm(path) and not is_bias(path)}
    ends = np.cumsum([0, *(x.size for x in matrices.values())])
    flat = std * jax.random.normal(key, (int(ends[-1]),))
    arrays = {path: jnp.full(x.shape, is_norm(path), x.dtype) for path, x in shapes.items()}
    for (path, x), start in zip(matrices.items(), ends[:-1], strict=True):
        arrays[path] = flat[start : start + x.size].reshape(x.shape).astype(x.dtype)
    return unflatten_dict(arrays)
