"""Low-rank adapters: a frozen model, and beside each chosen matrix two thin ones that are trained.

    y = x W + (alpha / rank) (x A) B        A [inputs, rank], B [rank, outputs]

Hu et al. 2021 (arXiv:2106.09685); over integers in place of W, Dettmers et al. 2023 (QLoRA, arXiv:2305.14314). W and
A B are never added up in training. A begins uniform in +-1 / sqrt(inputs), B at zero, as in `peft`. The params of such
a model are {"base": those of the frozen model, "adapter": A and B of each matrix}; only the second part has gradients
and moments.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from rtd_jax.base.settings import check_distinct, check_filled, check_ranges
from rtd_jax.base.types import Params
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.quantized import ROUNDED, as_float, quantize_params
from rtd_jax.models.weights import ADAPTER, ADAPTER_TABLE, BASE, ROWS, Weight, axis_sizes

BaseDtype = Literal["float32", "bfloat16", "int8", "int4"]


@dataclass(frozen=True)
class AdapterSettings:
    """A low-rank adapter, and the frozen weights under it."""

    rank: int = 0  # columns of A and rows of B; 0: no adapter, all weights are trained
    alpha: float = 32.0  # the adapter's part is multiplied by alpha / rank
    matrices: tuple[str, ...] = tuple(ADAPTER_TABLE)  # that get one, of every layer
    base_dtype: BaseDtype = "bfloat16"  # of the frozen weights in memory; int8: a scale per channel; int4: of 64 inputs

    def __post_init__(self) -> None:
        check_ranges(self, rank="[0, 1e5]", alpha="(0, 1e6]")
        check_filled(self, "matrices")
        check_distinct(self, "matrices")
        unknown = [name for name in self.matrices if name not in ADAPTER_TABLE]
        if unknown:
            raise ValueError(f"matrices has {unknown[0]!r}; expected some of {', '.join(ADAPTER_TABLE)}")

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / self.rank

    @property
    def rows(self) -> tuple[Weight, ...]:
        """The table of the adapter's weights: A and B of each matrix."""
        chosen = [name for name in ADAPTER_TABLE if name in self.matrices]
        return tuple(replace(row, rank=self.rank) for name in chosen for row in ADAPTER_TABLE[name])

    def check(self, config: DecoderConfig) -> None:
        """Raises ValueError where a matrix has fewer rows or columns than the rank."""
        for a, b in zip(self.rows[::2], self.rows[1::2], strict=True):
            most = min(a.hf_shape(config)[1], b.hf_shape(config)[0])
            if self.rank > most:
                name = a.path[-2].removesuffix("_adapter")
                raise ValueError(
                    f"adapter.rank is {self.rank}, but the matrices {name!r} of this model have no more than {most} "
                    f"rows or columns; give at most {most}, or leave {name!r} out of adapter.matrices"
                )

    def unread_settings(self) -> dict[str, str]:
        return {} if self.rank else dict.fromkeys(("alpha", "matrices", "base_dtype"), "student.adapter.rank is 0")


def has_adapter(params: Any) -> bool:
    """Whether params have the two parts of a model with an adapter."""
    return isinstance(params, dict) and params.keys() == {BASE, ADAPTER}


def frozen(params: Params, dtype: str) -> Params:
    """Float params as the weights under an adapter: in `dtype`, or rounded. Traceable."""
    if dtype not in ROUNDED:
        return jax.tree.map(lambda x: x.astype(dtype), params)
    kept = [path for path, row in ROWS.items() if not row.inputs]  # norms and biases
    leaves = flatten_dict(quantize_params(params, dtype))
    return unflatten_dict({path: x.astype("bfloat16") if path in kept else x for path, x in leaves.items()})


def base_as_float(params: Params, dtype: str) -> Params:
    """The weights under an adapter as floats, as they compute. Traceable."""
    return unflatten_dict({path: as_float(x, dtype) for path, x in flatten_dict(params[BASE]).items()})


def init_adapter(settings: AdapterSettings, config: DecoderConfig, key: jax.Array) -> Params:
    """A at random, B zero, float32; with it a model gives what its base alone gives. Traceable."""
    keys = jax.random.split(key, len(settings.rows))

    def draw(row: Weight, key: jax.Array) -> jax.Array:
        if row.path[-1] == "b":
            return jnp.zeros(row.shape(config))
        bound = 1 / math.sqrt(math.prod(axis_sizes(config)[axis] for axis in row.inputs))
        return jax.random.uniform(key, row.shape(config), minval=-bound, maxval=bound)

    return unflatten_dict({row.path: draw(row, key) for row, key in zip(settings.rows, keys, strict=True)})


def with_adapter(params: Params) -> Params:
    """One tree of the two parts, as the decoder's modules hold them."""
    return unflatten_dict(flatten_dict(params[BASE]) | flatten_dict(params[ADAPTER]))


@functools.partial(jax.jit, static_argnums=(1, 2))
def merged(params: Params, settings: AdapterSettings, dtype: str) -> Params:
    """The float params of a model without an adapter that computes the same: W + (alpha / rank) A B, in `dtype`.

    Sums are formed in float32. Norms, biases and what else has no adapter are the base's own, in `dtype` too.
    """
    adapter = flatten_dict(params[ADAPTER])

    def one(path: tuple[str, ...], array: Any) -> jax.Array:
        place = (*path[:-1], f"{path[-1]}_adapter")
        if (*place, "a") not in adapter:
            return as_float(array, dtype)

        def of_layer(layer: tuple[Any, jax.Array, jax.Array]) -> jax.Array:
            weight, a, b = layer
            change = jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)
            return (as_float(weight, jnp.float32) + settings.scale * change).astype(dtype)

        # One layer at a time, so that no float32 copy of all layers exists.
        return jax.lax.map(of_layer, (array, adapter[*place, "a"], adapter[*place, "b"]))

    return unflatten_dict({path: one(path, array) for path, array in flatten_dict(params[BASE]).items()})
