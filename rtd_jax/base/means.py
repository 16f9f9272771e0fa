"""Masked reductions, and means kept as (sum, count) until the last moment.

A mean of micro-batch means is not the mean of the batch. Every metric is therefore kept as a `Mean`, added across
micro-batches, devices and updates, and divided only when it is shown.
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rtd_jax.base.types import Array


class Mean(NamedTuple):
    """A mean as its sum and its count, both float32 scalars."""

    sum: Array
    count: Array  # type: ignore[assignment]  # hides tuple.count, which nobody calls on a mean

    def merge(self, other: "Mean") -> "Mean":
        return Mean(self.sum + other.sum, self.count + other.count)

    def value(self) -> Array:
        """`sum / count`, and 0 where nothing was counted."""
        return safe_divide(self.sum, self.count)


Metrics = dict[str, Mean]


def safe_divide(numerator: Array, denominator: Array) -> Array:
    """`numerator / denominator`, and exactly 0 with zero gradient where the denominator is 0."""
    is_zero = denominator == 0
    return jnp.where(is_zero, 0.0, numerator / jnp.where(is_zero, 1.0, denominator))


def within(values: Array, low: float, high: float = math.inf) -> Array:
    """Values cut to the range of the exact ones, which rounding can leave; the gradient is that of `values`."""
    excess = jnp.minimum(values - low, 0.0)
    if high != math.inf:
        excess += jnp.maximum(values - high, 0.0)
    return values - jax.lax.stop_gradient(excess)


def masked_sum(values: Array, mask: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """Sum of `values` where `mask`; what is masked contributes nothing even when it is NaN (NaN * 0 is NaN)."""
    chex.assert_equal_shape([values, mask])
    return jnp.sum(jnp.where(mask, values, 0.0), axis=axis)


def mean_per_chain(values_K: Array, mask_K: Array) -> Array:
    """Mean over the last axis where the mask is True, float32 [...]; 0 where it is True nowhere.

    Args:
      values_K: float [..., K].
      mask_K: bool [..., K].
    """
    count = jnp.sum(mask_K, axis=-1)
    total = masked_sum(values_K.astype(jnp.float32), mask_K, axis=-1)
    return safe_divide(total, count.astype(jnp.float32))
