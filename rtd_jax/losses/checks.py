"""What the losses' plain arguments may be. Traced values cannot be checked, and pass."""

import math
from typing import Any

import numpy as np

from rtd_jax.base.types import Array


def check_number(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """Raises ValueError where a plain number is outside [low, high] or not finite."""
    is_plain = isinstance(value, int | float | np.number)
    if is_plain and not (low <= value <= high and math.isfinite(value)):
        limits = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ValueError(f"{name} is {value}; expected a number {limits}")


def check_temperature(temperature: Any) -> None:
    """Raises ValueError where a softmax at this temperature cannot be formed in float32."""
    check_number("temperature", temperature, 1e-3, 1e6)


def check_vocabulary(vocab_size: int, **logits_or_heads: Array) -> None:
    """Raises ValueError where an array, [..., V], has fewer columns than the vocabulary has real entries."""
    check_number("vocab_size", vocab_size, 1)
    for name, array in logits_or_heads.items():
        if vocab_size > array.shape[-1]:
            raise ValueError(
                f"vocab_size is {vocab_size}, but {name} has {array.shape[-1]} columns; expected at most as many: it "
                "is the number of real entries, and the columns beyond it are padding"
            )
