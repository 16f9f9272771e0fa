"""A frozen model's matrices in int8, half the size of bfloat16, or in int4, a quarter of it; products in float.

    int8: w ~ q * s,  s = max |w| / 127.5 over the axes that the product sums over: one scale per output channel
    int4: w ~ q * s,  s = max |w| / 7.5 over up to 64 neighbours along the last of these axes

int8 is the weight-only "absmax" quantisation of LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339) without its outlier
columns; the blocks of int4 are as long as those of QLoRA (Dettmers et al. 2023, arXiv:2305.14314). With int4 the
embedding and the head are in int8. Norms are not quantised. The quantised arrays and their arithmetic are qwix's.
"""

import math

import jax
import jax.numpy as jnp
import qwix
from flax.traverse_util import flatten_dict, unflatten_dict
from qwix import QArray

from rtd_jax.base.types import Params
from rtd_jax.models.weights import TABLE, Weight

INT8, INT4 = "int8", "int4"
ROUNDED = (INT8, INT4)
_BLOCK = 64  # inputs of an output that share a scale in int4


def quantize_weight(array: jax.Array, weight: Weight, dtype: str = INT8) -> QArray | jax.Array:
    """Quantises one array of the params, of all layers or of one; returns a norm unchanged."""
    if not weight.inputs:
        return array
    axes = weight.axes if array.ndim == len(weight.axes) else weight.param_axes
    if dtype == INT8 or not weight.stacked:
        outputs = [i for i, axis in enumerate(axes) if axis not in weight.inputs]
        return qwix.quantize(array, jnp.int8, channelwise_axes=outputs, scale_dtype=jnp.float32)
    last = axes.index(weight.inputs[-1])
    return qwix.quantize(
        array,
        jnp.int4,
        channelwise_axes=[i for i in range(array.ndim) if i != last],
        tiled_axes={last: math.gcd(_BLOCK, array.shape[last])},
        scale_dtype=jnp.float32,
    )


def quantize_params(params: Params, dtype: str = INT8) -> Params:
    """The params with every matrix as a `QArray`. Traceable; raises KeyError for a leaf that is no weight."""
    rows = {weight.path: weight for weight in TABLE}
    return unflatten_dict({path: quantize_weight(x, rows[path], dtype) for path, x in flatten_dict(params).items()})


def as_float(value: QArray | jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The array in `dtype`; integers are multiplied by their scales, in float32."""
    if isinstance(value, QArray):
        # A scale rounded to bfloat16 would put one common error on all that share it.
        return qwix.dequantize(value.replace(scale=value.scale.astype(jnp.float32))).astype(dtype)
    return value.astype(dtype)
