"""The description of a Llama (its sizes, rotary embedding and special token ids), and how its layers are counted."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

_ROPE_KINDS = ("default", "llama3")
_LLAMA3_FACTORS = ("factor", "low_freq_factor", "high_freq_factor")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021); `kind="llama3"` adds the frequency scaling of Llama 3.1.

    The scaling multiplies wavelengths longer than `original_max_positions / low_freq_factor` tokens by `factor`, keeps
    those shorter than `original_max_positions / high_freq_factor`, and interpolates between the two. With
    `kind="default"` only `theta` is used.

    Raises:
      ValueError: an unknown kind, or frequency factors that are not in order.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in _ROPE_KINDS:
            raise ValueError(
                f"rope type {self.kind!r} is not supported; known: {', '.join(_ROPE_KINDS)}. "
                "Use a checkpoint without it, or a Llama 3.x one"
            )
        if self.kind == "llama3" and not self.high_freq_factor > self.low_freq_factor > 0:
            raise ValueError(
                f"llama3 rope needs high_freq_factor > low_freq_factor > 0, got {self.high_freq_factor} and "
                f"{self.low_freq_factor}"
            )

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "RopeConfig":
        """Reads `rope_parameters` (transformers >= 5), or the earlier top-level `rope_theta` and `rope_scaling`."""
        rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
        theta = float(rope.get("rope_theta") or hf.get("rope_theta") or 10_000.0)
        kind = rope.get("rope_type") or rope.get("type") or "default"
        partial = rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
        if partial != 1.0:
            raise ValueError(f"partial_rotary_factor {partial} is not supported; only 1.0 is (plain Llama)")
        if kind != "llama3":
            return cls(theta, kind)
        missing = [key for key in _LLAMA3_FACTORS if key not in rope]
        if missing:
            raise ValueError(f"rope type 'llama3' lacks {', '.join(missing)}; add them as in Llama-3.1")
        positions = rope.get("original_max_position_embeddings") or hf.get("max_position_embeddings") or 2048
        factors = {key: float(rope[key]) for key in _LLAMA3_FACTORS}
        return cls(theta=theta, kind=kind, original_max_positions=int(positions), **factors)

    def to_hf(self) -> dict[str, Any]:
        """Keys for `config.json` in both spellings: a reader that knows only one would silently use theta 10,000."""
        scaling: dict[str, Any] = {"rope_type": self.kind}
        if self.kind == "llama3":
            scaling |= {key: getattr(self, key) for key in _LLAMA3_FACTORS}
            scaling["original_max_position_embeddings"] = self.original_max_positions
        return {
            "rope_theta": self.theta,
            "rope_scaling": None if self.kind == "default" else scaling,
            "rope_parameters": {"rope_theta": self.theta, **scaling},
        }


def _to_hashable(token_ids: int | list[int]) -> int | tuple[int, ...]:
    return tuple(token_ids) if isinstance(token_ids, list) else token_ids


# The entries of a Hugging Face config.json, by our names for them. Reading and writing both use these tables.
_SIZES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}
_OPTIONS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "norm_eps": ("rms_norm_eps", float),
    "tied_embeddings": ("tie_word_embeddings", bool),
    "max_positions": ("max_position_embeddings", int),
    "init_std": ("initializer_range", float),
    "bos_token_id": ("bos_token_id", _to_hashable),
    "eos_token_id": ("eos_token_id", _to_hashable),
    "pad_token_id": ("pad_token_id", _to_hashable),
}


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a Llama. Hashable, so it can be a static argument of jit. Raises ValueError for impossible sizes."""

    vocab_size: int  # rows of the embedding, padded rows included
    width: int
    mlp_width: int
    layers: int
    heads: int  # query heads
    kv_heads: int  # key/value heads; heads % kv_heads == 0
    head_dim: int
    norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    tied_embeddings: bool = False
    max_positions: int = 2048  # tokens; recorded only, longer rows are not refused
    init_std: float = 0.02  # of every matrix at random initialisation (HF initializer_range)
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in (*_SIZES, "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"LlamaConfig.{name} is {getattr(self, name)}; it must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"LlamaConfig.heads {self.heads} is not a multiple of kv_heads {self.kv_heads}; "
                f"use a divisor of {self.heads} for kv_heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"LlamaConfig.head_dim {self.head_dim} is odd; rotary embedding needs pairs")

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "LlamaConfig":
        """Builds a config from the content of a Hugging Face `config.json`.

        Raises:
          ValueError or TypeError: another architecture, missing or impossible sizes, or what this decoder does not
            compute (biases, other activations, other rope types, quantised weights).
        """
        if hf.get("model_type") != "llama":
            raise ValueError(f"model_type is {hf.get('model_type')!r}, expected 'llama'; use a Llama checkpoint")
        derived = ("kv_heads", "head_dim")
        missing = [key for name, key in _SIZES.items() if name not in derived and hf.get(key) is None]
        if missing:
            raise ValueError(f"missing {', '.join(missing)}; take config.json from the original checkpoint")
        for key in ("attention_bias", "mlp_bias"):
            if hf.get(key):
                raise ValueError(f"{key} is {hf[key]!r}; only Llamas without biases are supported")
        if hf.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act is {hf['hidden_act']!r}; only 'silu' is supported")
        if hf.get("quantization_config"):
            raise ValueError(
                "the checkpoint is quantised (quantization_config); use the original float weights, or dequantise it "
                "and save it again with transformers"
            )
        width, heads = int(hf["hidden_size"]), int(hf["num_attention_heads"])
        if heads and not hf.get("head_dim") and width % heads:
            raise ValueError(f"hidden_size {width} is not a multiple of num_attention_heads {heads}; set head_dim")
        values: dict[str, Any] = {"kv_heads": heads, "head_dim": width // max(heads, 1), "norm_eps": 1e-6}
        values |= {name: int(hf[key]) for name, key in _SIZES.items() if hf.get(key) is not None}
        for name, (key, read) in _OPTIONS.items():
            if key in hf and hf[key] is None and read is float:
                raise ValueError(
                    f"{key} is null; give the number that the model was trained with, or leave the key out"
                )
            if hf.get(key) is not None:
                values[name] = read(hf[key])
        return cls(**values, rope=RopeConfig.from_hf(hf))

    def layer_index(self, layer: int) -> int:
        """The number of a hidden state, counted as transformers counts `output_hidden_states`.

        0 is the embeddings, i the output of layer i, and N = `layers` the final normed states; -1 to -N - 1 count from
        the end.

        Raises:
          ValueError: there is no such hidden state.
        """
        if not -self.layers - 1 <= layer <= self.layers:
            raise ValueError(
                f"hidden layer {layer} does not exist: a model of {self.layers} layers has 0 (embeddings) to "
                f"{self.layers} (final), or -{self.layers + 1} to -1 from the end"
            )
        return layer % (self.layers + 1)

    def to_hf(self) -> dict[str, Any]:
        """The content of a `config.json` that `transformers` reads as LlamaForCausalLM."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **{key: values[name] for name, key in _SIZES.items()},
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            **{key: values[name] for name, (key, _) in _OPTIONS.items()},
            **self.rope.to_hf(),
        }


def layers_to_copy(layers: int, count: int) -> tuple[int, ...]:
    """The `count` layers that a shallower model takes from a model of `layers`, counted from 0: (7, 3) gives 0, 3, 6.

    They are evenly spaced and include the first and the last; a single one is the first.

    Raises:
      ValueError: unless 1 <= count <= layers.
    """
    if not 1 <= count <= layers:
        raise ValueError(f"cannot take {count} evenly spaced layers of {layers}; use 1 to {layers}")
    return tuple(int(i) for i in np.round(np.linspace(0, layers - 1, count)))


def layers_to_match(layers: int, count: int) -> tuple[int, ...]:
    """The `count` hidden states at which a model of `layers` is matched with another: (4, 4) gives 1, 2, 3, 4.

    They are counted as `LlamaConfig.layer_index` counts them, evenly spaced, and end with the last. Of fewer layers
    than `count`, some repeat: (2, 4) gives 1, 1, 2, 2.
    """
    return tuple(-(-layers * (i + 1) // count) for i in range(count))
