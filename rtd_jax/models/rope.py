"""Rotary position embedding: its description in a config.json, and the angles that it gives.

Kinds, as transformers names them:

    default  theta^(-2i/E) radians a position for pair i of E / 2 (Su et al. 2021, arXiv:2104.09864)
    linear   the same divided by `factor` (Chen et al. 2023, arXiv:2306.15595)
    dynamic  the same as default in rows of at most `original_max_positions` tokens; longer ones are refused
    llama3   wavelengths above `original_max_positions / low_freq_factor` tokens are multiplied by `factor`, those below
             `original_max_positions / high_freq_factor` are kept, those between are interpolated
    yarn     pairs that turn more than `beta_fast` times in `original_max_positions` tokens are kept, those that turn
             less than `beta_slow` times are slowed down by `factor`, those between are interpolated; cosine and sine
             are multiplied by `attention_factor` (Peng et al. 2023, arXiv:2309.00071)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rtd_jax.models.config_values import agreed, flag, positive, shown, whole

# What the kinds read besides theta, of a config.json's object.
_FACTORS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor"),
}
_SCALED_FROM = ("llama3", "yarn")  # kinds that need `original_max_position_embeddings`
_BETA_FAST, _BETA_SLOW = 32.0, 1.0  # of yarn, where a config.json leaves them out


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of one of the kinds above. With `kind="default"` only `theta` is used.

    Raises:
      ValueError: an unknown kind, or frequency factors that are not in order.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192  # tokens
    beta_fast: float = _BETA_FAST  # turns
    beta_slow: float = _BETA_SLOW  # turns
    attention_factor: float = 1.0
    truncate: bool = True  # yarn: interpolate between whole pairs

    def __post_init__(self) -> None:
        if self.kind not in tuple(_FACTORS):  # which may be anything that JSON has
            raise ValueError(
                f"rope type {self.kind!r} is not supported; known: {', '.join(_FACTORS)}. Use a checkpoint with one of "
                "them"
            )
        if self.kind == "llama3" and not self.high_freq_factor > self.low_freq_factor > 0:
            raise ValueError(
                f"llama3 rope needs high_freq_factor > low_freq_factor > 0, got {self.high_freq_factor} and "
                f"{self.low_freq_factor}"
            )
        if self.kind == "yarn" and not self.beta_fast > self.beta_slow:
            raise ValueError(f"yarn rope needs beta_fast > beta_slow, got {self.beta_fast} and {self.beta_slow}")

    @property
    def longest_row(self) -> float:
        """Tokens of the longest row that it can be computed for."""
        return self.original_max_positions if self.kind == "dynamic" else math.inf

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Angle per position of each rotated pair, in radians. float32 [E / 2]."""
        frequencies = self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.kind == "linear":
            frequencies = frequencies / self.factor
        elif self.kind == "llama3":
            turns = self.original_max_positions * frequencies / (2 * np.pi)  # over the original context
            smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            smooth = np.clip(smooth, 0.0, 1.0)
            frequencies = frequencies * (smooth + (1 - smooth) / self.factor)
        elif self.kind == "yarn":
            kept = 1 - self._slowed(head_dim)
            frequencies = frequencies * (kept + (1 - kept) / self.factor)
        return frequencies.astype(np.float32)

    def _slowed(self, head_dim: int) -> np.ndarray:
        """How far each pair is on the way from kept, 0, to slowed down by the whole factor, 1. float64 [E / 2]."""

        def pair_that_turns(times: float) -> float:
            original = math.log(self.original_max_positions / (times * 2 * math.pi))
            return head_dim * original / (2 * math.log(self.theta))

        first, last = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        last += 0.001 if first == last else 0
        return np.clip((np.arange(head_dim // 2) - first) / (last - first), 0.0, 1.0)

    @classmethod
    def from_hf(cls, hf: dict[str, Any], *, theta: float = 10_000.0, positions: int = 2048) -> "RopeConfig":
        """Reads `rope_parameters` (transformers >= 5), or the earlier top-level `rope_theta` and `rope_scaling`.

        A config.json may have both if they say the same. Of two that differ, readers take one or the other.

        Args:
          theta: where none is given.
          positions: the longest text, where no `max_position_embeddings` is given.

        Raises:
          ValueError: a value that cannot be, two that contradict each other, or a kind that is not supported.
        """
        positions = whole("max_position_embeddings", hf.get("max_position_embeddings", positions))
        found: dict[str, RopeConfig] = {}
        for spelling in ("rope_parameters", "rope_scaling"):
            rope = hf.get(spelling)
            if rope is not None and not isinstance(rope, dict):
                raise ValueError(f"{spelling} is {rope!r}; expected an object, or null")
            if rope:
                found[spelling] = cls._of_spelling(rope, spelling, hf, theta, positions)
        if len(set(found.values())) > 1:
            both = " but ".join(f"{spelling} is {hf[spelling]}" for spelling in found)
            raise ValueError(f"{both}; remove the one that the model was not trained with")
        return next(iter(found.values()), None) or cls._of_spelling({}, "rope_parameters", hf, theta, positions)

    @classmethod
    def _of_spelling(
        cls, rope: dict[str, Any], spelling: str, hf: dict[str, Any], usual_theta: float, positions: int
    ) -> "RopeConfig":
        """What one of the two objects says, with the keys that stand beside it in config.json."""

        def beside(key: str, read: Callable[[str, Any], Any]) -> Any:
            return agreed({f"{spelling}.{key}": rope.get(key), key: hf.get(key)}, read)

        nested = next((key for key, value in rope.items() if isinstance(value, dict)), None)
        if nested:
            raise ValueError(f"{spelling}.{nested} is an object: another rope for some layers is not supported")
        theta = beside("rope_theta", positive)
        if theta is None and "rope_theta" in (*rope, *hf):
            raise ValueError("rope_theta is null; give the number that the model was trained with")
        kinds = {f"{spelling}.{key}": rope.get(key) for key in ("rope_type", "type")}
        kind = agreed(kinds, lambda _, value: value) or "default"
        if (partial := beside("partial_rotary_factor", positive)) not in (None, 1.0):
            raise ValueError(f"partial_rotary_factor {partial} is not supported; only 1.0 is: whole heads rotate")
        theta = usual_theta if theta is None else theta
        if kind not in tuple(_FACTORS)[1:]:
            return cls(theta, kind)
        original = beside("original_max_position_embeddings", whole) if kind in _SCALED_FROM else None
        original = positions if original is None else original
        given = {key: rope[key] for key in _FACTORS[kind] if rope.get(key) is not None}
        factors: dict[str, Any] = {key: positive(f"{spelling}.{key}", value) for key, value in given.items()}
        if kind == "yarn":
            factors.setdefault("factor", positions / original)
            _check_attn_factor(rope, spelling, factors)
            factors.setdefault("attention_factor", _attention_factor(rope, spelling, factors["factor"]))
            truncate = flag(f"{spelling}.truncate", rope.get("truncate", True))
            return cls(theta, kind, original_max_positions=original, truncate=truncate, **factors)
        missing = [key for key in _FACTORS[kind] if key not in factors]
        if missing:
            raise ValueError(f"rope type {kind!r} lacks {', '.join(missing)}; add them as in the original checkpoint")
        return cls(theta, kind, original_max_positions=original, **factors)

    def to_hf(self) -> dict[str, Any]:
        """Keys for `config.json` in both spellings: a reader that knows only one would silently use theta 10,000."""
        scaling: dict[str, Any] = {"rope_type": self.kind, **{key: getattr(self, key) for key in _FACTORS[self.kind]}}
        if self.kind in _SCALED_FROM:
            scaling["original_max_position_embeddings"] = self.original_max_positions
        if self.kind == "yarn":
            scaling["truncate"] = self.truncate
        return {
            "rope_theta": self.theta,
            "rope_scaling": None if self.kind == "default" else scaling,
            "rope_parameters": {"rope_theta": self.theta, **scaling},
        }


def _check_attn_factor(rope: dict[str, Any], spelling: str, factors: dict[str, float]) -> None:
    """Raises ValueError where readers disagree by what cosine and sine are multiplied.

    DeepSeek-R1-0528-Qwen3-8B has an `attn_factor`: vLLM multiplies its own factor with it, transformers passes over it.
    """
    if rope.get("attn_factor") is None or "attention_factor" in factors:
        return
    own = _attention_factor(rope, spelling, factors["factor"])
    if (times := positive(f"{spelling}.attn_factor", rope["attn_factor"])) != 1.0:
        raise ValueError(
            f"{spelling}.attn_factor is {times:.6g}: vLLM multiplies cosine and sine by {own * times:.6g} for it, and "
            f"transformers, which does not read it, by {own:.6g}; put the one that the model was trained with as "
            "attention_factor in its place"
        )


def _attention_factor(rope: dict[str, Any], spelling: str, factor: float) -> float:
    """What yarn multiplies cosine and sine with where no `attention_factor` is given: 0.1 ln(factor) + 1."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    weights: list[Any] = [rope.get(key) for key in ("mscale", "mscale_all_dim")]
    for key, value in zip(("mscale", "mscale_all_dim"), weights, strict=True):
        if value is not None and (type(value) not in (int, float) or not 0 <= value <= 1e6):
            raise ValueError(f"{spelling}.{key} is {shown(value)}; expected a number of at least 0")
    return scale(weights[0]) / scale(weights[1]) if all(weights) else scale(1.0)
