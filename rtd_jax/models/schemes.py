"""Rounding a student's matrices for deployment: to which values, and how many of them share a scale.

    w ~ (q - z) * s,  one s (and z) for each row of [outputs, inputs] and each group of `group_size` inputs

Groups lie along the axes that a product sums over, as in GPTQ (Frantar et al. 2022, arXiv:2210.17323) and in what
serving engines read. The rounding itself is qwix's: the scale of a group is its largest magnitude over the largest
value of the type (of integers half a step more, which is 7.5 for 4 bits). `models/quantized.py` has the plainer int8 of
a frozen teacher.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax.traverse_util import flatten_dict, unflatten_dict
from qwix import QArray

from rtd_jax.base.types import Params
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.weights import ROWS, Weight, axis_sizes, table

QType = Literal["int8", "int4", "int3", "int2", "nf4", "fp8"]
BITS: dict[QType, int] = {"int8": 8, "int4": 4, "int3": 3, "int2": 2, "nf4": 4, "fp8": 8}
_QWIX: dict[QType, Any] = {"int8": jnp.int8, "int4": jnp.int4, "fp8": jnp.float8_e4m3fn}  # others by their names
_ASYMMETRIC = ("int8", "int4")
# On the largest magnitude of a group. Without it, that weight would lie half-way between two integers, and the last bit
# of a division, which depends on what XLA fuses, would choose: what is trained and what is saved could differ.
_MARGIN = 1.00001
_OUTSIDE = (("embedding",), ("head",))


@dataclass(frozen=True)
class Scheme:
    """How a student's matrices are rounded. Hashable. Raises ValueError for what does not exist."""

    qtype: QType  # of the values; nf4: the 16 quantiles of a normal distribution (QLoRA); fp8: e4m3
    group_size: int = 128  # inputs of an output that share a scale; 0: all of them
    symmetric: bool = True  # no zero point; of int8 and int4 only can it be False
    head: bool = False  # round the embedding and the head too

    def __post_init__(self) -> None:
        if self.qtype not in get_args(QType):
            raise ValueError(f"there is no scheme {self.qtype!r}; use one of {', '.join(get_args(QType))}")
        if self.group_size < 0:
            raise ValueError(f"group_size is {self.group_size}; it must be 0 (a whole output channel) or more")
        if not self.symmetric and self.qtype not in _ASYMMETRIC:
            raise ValueError(f"{self.qtype} has no zero points; leave symmetric=True, or use int8 or int4")

    @property
    def name(self) -> str:
        """In a few words, for reports and folders."""
        group = f"g{self.group_size}" if self.group_size else "channel"
        return "-".join((self.qtype, group, *([] if self.symmetric else ["asym"]), *(["head"] if self.head else [])))

    def covers(self, weight: Weight) -> bool:
        """Whether a row of the table is rounded: every matrix of the layers, others by `head`, a norm never."""
        return bool(weight.inputs) and (self.head or weight.path not in _OUTSIDE)

    def check(self, config: DecoderConfig) -> None:
        """Raises ValueError where the group size does not divide the inputs of a matrix."""
        sizes = axis_sizes(config)
        for weight in table(config):
            inputs = int(np.prod([sizes[axis] for axis in weight.inputs]))
            if self.covers(weight) and self.group_size and inputs % self.group_size:
                raise ValueError(
                    f"group_size {self.group_size} does not divide the {inputs} inputs of {weight.names(config)[0]}; "
                    f"use a divisor of {int(np.gcd.reduce(_inputs(self, config)))}, or 0 for one scale per output "
                    "channel"
                )


def _inputs(scheme: Scheme, config: DecoderConfig) -> list[int]:
    """The number of inputs of every matrix that the scheme covers."""
    sizes = axis_sizes(config)
    rows = [weight for weight in table(config) if scheme.covers(weight)]
    return [int(np.prod([sizes[axis] for axis in weight.inputs])) for weight in rows]


@functools.partial(jax.jit, static_argnums=1)  # compiled, XLA multiplies by 1/7.5: without it other last bits
def round_matrix(array_OI: jax.Array, scheme: Scheme) -> QArray:
    """A matrix of outputs by inputs, rounded to the nearest. qvalue [O, I]; scale, zero_point [O, groups]."""
    group = scheme.group_size or array_OI.shape[-1]
    return qwix.quantize(
        array_OI.astype(jnp.float32),
        _QWIX.get(scheme.qtype, scheme.qtype),
        channelwise_axes=(0,),
        tiled_axes={1: group},
        calibration_method=f"absmax,{_MARGIN}" if scheme.symmetric else "minmax",
    )


def rounded(params: Params, scheme: Scheme) -> Params:
    """The params with every matrix of the scheme as `QArray` of [N, O, I] or [O, I], rounded to the nearest.

    What is not covered stays as it is. Traceable; `as_params` is the way back.
    """

    def one(path: tuple[str, ...], array: jax.Array) -> Any:
        weight = ROWS[path]
        if not scheme.covers(weight):
            return array
        return _over_layers(weight, lambda layer: round_matrix(weight.to_matrix(layer), scheme))(array)

    return unflatten_dict({path: one(path, array) for path, array in flatten_dict(params).items()})


def as_params(params: Params, config: DecoderConfig) -> Params:
    """Float params from those of `rounded`: float32 [..., axes of the table]. Traceable."""
    sizes = axis_sizes(config)

    def one(path: tuple[str, ...], array: Any) -> jax.Array:
        if not isinstance(array, QArray):
            return array
        weight = ROWS[path]
        shape = tuple(sizes[axis] for axis in weight.param_axes)
        return _over_layers(weight, lambda layer: as_layer(layer, weight, shape))(array)

    return unflatten_dict({path: one(path, array) for path, array in flatten_dict(params).items()})


def as_layer(matrix: QArray, weight: Weight, shape: tuple[int, ...]) -> jax.Array:
    """One layer's array from its rounded matrix, float32 of `shape`. Traceable."""
    return weight.from_matrix(qwix.dequantize(matrix), shape)


def fake_rounded(array: jax.Array, weight: Weight, scheme: Scheme) -> jax.Array:
    """One layer's array as the rounded model has it, with the gradient of the array itself (straight through).

    Bengio et al. 2013 (arXiv:1308.3432); for weights, Jacob et al. 2017 (arXiv:1712.05877). float32 if it is rounded.
    """
    if not scheme.covers(weight):
        return array
    array = array.astype(jnp.float32)
    values = as_layer(round_matrix(weight.to_matrix(array), scheme), weight, array.shape)
    # In this order the value is the rounded one to the last bit: array + (values - array) would not be.
    return jax.lax.stop_gradient(values) + (array - jax.lax.stop_gradient(array))


def fake_rounded_layer(weights: Params, scheme: Scheme) -> Params:
    """`fake_rounded` for each array of one layer."""
    rows = {path: ROWS["layers", *path] for path in flatten_dict(weights)}
    return unflatten_dict({path: fake_rounded(x, rows[path], scheme) for path, x in flatten_dict(weights).items()})


def _over_layers(weight: Weight, function: Callable) -> Callable:
    return jax.vmap(function) if weight.stacked else function
