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


def check_count(name: str, value: Any) -> None:
    """Raises ValueError where a number of things is no whole number, or below 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name} is {value!r}; expected a whole number at least 1")
    check_number(name, value, 1)


def check_temperature(temperature: Any) -> None:
    """Raises ValueError where a softmax at this temperature cannot be formed in float32."""
    check_number("temperature", temperature, 1e-3, 1e6)


def check_vocabulary(vocab_size: int, **logits_or_heads: Array) -> None:
    """Raises ValueError where an array, [..., V], has fewer columns than the vocabulary has real entries."""
    check_count("vocab_size", vocab_size)
    for name, array in logits_or_heads.items():
        if vocab_size > array.shape[-1]:
            raise ValueError(
                f"vocab_size is {vocab_size}, but {name} has {array.shape[-1]} columns; expected at most as many: it "
                "is the number of real entries, and the columns beyond it are padding"
            )
