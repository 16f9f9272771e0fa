"""A frozen model's matrices in int8, half the size of bfloat16: one scale per output channel, products in float.

    w ~ q * s,  q int8,  s = max |w| / 127.5 over the axes that the product sums over

This is the weight-only "absmax" quantisation of LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339) without its outlier
columns. Norms are not quantised. The quantised arrays and their arithmetic are qwix's.
"""

import jax
import jax.numpy as jnp
import qwix
from flax.traverse_util import flatten_dict, unflatten_dict
from qwix import QArray

from rtd_jax.base.types import Params
from rtd_jax.models.weights import TABLE, Weight

INT8 = "int8"


def quantize_weight(array: jax.Array, weight: Weight) -> QArray | jax.Array:
    """Quantises one array of the params, of all layers or of one; returns a norm unchanged."""
    if not weight.inputs:
        return array
    axes = weight.axes if array.ndim == len(weight.axes) else weight.param_axes
    outputs = [i for i, axis in enumerate(axes) if axis not in weight.inputs]
    return qwix.quantize(array, jnp.int8, channelwise_axes=outputs, scale_dtype=jnp.float32)


def quantize_params(params: Params) -> Params:
    """The params with every matrix as a `QArray`. Traceable; raises KeyError for a leaf that is no weight."""
    rows = {weight.path: weight for weight in TABLE}
    return unflatten_dict({path: quantize_weight(array, rows[path]) for path, array in flatten_dict(params).items()})


def as_float(value: QArray | jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The array in `dtype`; int8 values are multiplied by their scales, in float32."""
    if isinstance(value, QArray):
        # A scale rounded to bfloat16 would put one common error on the whole channel.
        return (value.qvalue.astype(jnp.float32) * value.scale.astype(jnp.float32)).astype(dtype)
    return value.astype(dtype)
