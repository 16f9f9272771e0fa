"""The description of a Llama (its sizes, rotary embedding and special token ids), and how its layers are counted."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

_ROPE_KINDS = ("default", "llama3")
_LLAMA3_FACTORS = ("factor", "low_freq_factor", "high_freq_factor")
_MOST_LAYERS = 10_000
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_MOST = 2**31 - 1  # of any size: token ids and positions are int32


# Readers of one value of a config.json. Each raises a ValueError that names the key.


def _whole(key: str, value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{key} is {_shown(value)}; expected a whole number, as in the original config.json")
    if not 1 <= value <= _MOST:
        raise ValueError(f"{key} is {_shown(value)}; it must be at least 1, and at most {_MOST:,}")
    return value


def _positive(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not _SMALLEST <= value <= _LARGEST:
        raise ValueError(f"{key} is {_shown(value)}; expected a positive finite number, as in the original config.json")
    return float(value)


def _share(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ValueError(f"{key} is {_shown(value)}; expected a number from 0 to 1, as in the original config.json")
    return float(value)


def _flag(key: str, value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{key} is {_shown(value)}; expected true or false, as in the original config.json")
    return value


def _token_ids(key: str, value: Any) -> int | tuple[int, ...] | None:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int for token in ids):
        raise ValueError(f"{key} is {_shown(value)}; expected a token id, a list of them, or null")
    if key == "pad_token_id" and value == -1:
        return None  # how the first Llamas said that there is none
    return tuple(value) if isinstance(value, list) else value


def _shown(value: Any) -> str:
    """A value, or the beginning of a long one."""
    return "null" if value is None else repr(value)[:80]


def _agreed(places: dict[str, Any], read: Callable[[str, Any], Any]) -> Any:
    """The value that one or several places of a config.json give; None where all are null or absent.

    Raises:
      ValueError: two places give different values.
    """
    found = {place: read(place, value) for place, value in places.items() if value is not None}
    for place, value in found.items():
        first = next(iter(found))
        if value != found[first]:
            raise ValueError(
                f"{first} is {_shown(places[first])} but {place} is {_shown(places[place])}; remove the one that the "
                "model was not trained with"
            )
    return next(iter(found.values()), None)


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
        """Reads `rope_parameters` (transformers >= 5), or the earlier top-level `rope_theta` and `rope_scaling`.

        A config.json may have both if they say the same. Of two that differ, readers take one or the other.

        Raises:
          ValueError: a value that cannot be, two that contradict each other, or a kind that is not supported.
        """
        found: dict[str, RopeConfig] = {}
        for spelling in ("rope_parameters", "rope_scaling"):
            rope = hf.get(spelling)
            if rope is not None and not isinstance(rope, dict):
                raise ValueError(f"{spelling} is {rope!r}; expected an object, or null")
            if rope:
                found[spelling] = cls._of_spelling(rope, spelling, hf)
        if len(set(found.values())) > 1:
            both = " but ".join(f"{spelling} is {hf[spelling]}" for spelling in found)
            raise ValueError(f"{both}; remove the one that the model was not trained with")
        return next(iter(found.values()), None) or cls._of_spelling({}, "rope_parameters", hf)

    @classmethod
    def _of_spelling(cls, rope: dict[str, Any], spelling: str, hf: dict[str, Any]) -> "RopeConfig":
        """What one of the two objects says, with the keys that stand beside it in config.json."""

        def agreed(key: str, read: Callable[[str, Any], Any]) -> Any:
            return _agreed({f"{spelling}.{key}": rope.get(key), key: hf.get(key)}, read)

        nested = next((key for key, value in rope.items() if isinstance(value, dict)), None)
        if nested:
            raise ValueError(f"{spelling}.{nested} is an object: another rope for some layers is not supported")
        theta = agreed("rope_theta", _positive)
        if theta is None and "rope_theta" in (*rope, *hf):
            raise ValueError("rope_theta is null; give the number that the model was trained with")
        kinds = {f"{spelling}.{key}": rope.get(key) for key in ("rope_type", "type")}
        kind = _agreed(kinds, lambda _, value: value) or "default"
        if (partial := agreed("partial_rotary_factor", _positive)) not in (None, 1.0):
            raise ValueError(f"partial_rotary_factor {partial} is not supported; only 1.0 is (plain Llama)")
        theta = 10_000.0 if theta is None else theta
        if kind != "llama3":
            return cls(theta, kind)
        missing = [key for key in _LLAMA3_FACTORS if rope.get(key) is None]
        if missing:
            raise ValueError(f"rope type 'llama3' lacks {', '.join(missing)}; add them as in Llama-3.1")
        positions = agreed("original_max_position_embeddings", _whole)
        if positions is None:
            positions = _whole("max_position_embeddings", hf.get("max_position_embeddings", 2048))
        factors = {key: _positive(f"{spelling}.{key}", rope[key]) for key in _LLAMA3_FACTORS}
        return cls(theta=theta, kind=kind, original_max_positions=positions, **factors)

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
_OPTIONS: dict[str, tuple[str, Callable[[str, Any], Any]]] = {
    "norm_eps": ("rms_norm_eps", _positive),
    "tied_embeddings": ("tie_word_embeddings", _flag),
    "max_positions": ("max_position_embeddings", _whole),
    "init_std": ("initializer_range", _share),
    "bos_token_id": ("bos_token_id", _token_ids),
    "eos_token_id": ("eos_token_id", _token_ids),
    "pad_token_id": ("pad_token_id", _token_ids),
}
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def special_ids(hf: dict[str, Any]) -> dict[str, Any]:
    """The ids of special tokens in a config.json or generation_config.json, as arguments of `DecoderConfig`.

    Raises:
      ValueError: one is no token id, nor a list of them.
    """
    return {key: _token_ids(key, hf[key]) for key in _SPECIAL if key in hf}


@dataclass(frozen=True)
class DecoderConfig:
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
                raise ValueError(f"DecoderConfig.{name} is {getattr(self, name)}; it must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"DecoderConfig.heads {self.heads} is not a multiple of kv_heads {self.kv_heads}; use a divisor of "
                f"{self.heads} for kv_heads (in config.json, num_attention_heads and num_key_value_heads)"
            )
        if self.head_dim % 2:
            raise ValueError(f"DecoderConfig.head_dim {self.head_dim} is odd; rotary embedding needs pairs")
        for name in _SPECIAL:
            value = getattr(self, name)
            value = list(value) if isinstance(value, tuple) else value  # as config.json has it
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if any(not 0 <= token < self.vocab_size for token in ids):
                raise ValueError(
                    f"{name} is {value}, but the vocabulary of {self.vocab_size} has ids 0 to {self.vocab_size - 1}; "
                    "give the id that the tokenizer has for it"
                )

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "DecoderConfig":
        """Builds a config from the content of a Hugging Face `config.json`.

        Raises:
          ValueError: another architecture, a value that is missing, impossible or contradicts another one, or what this
            decoder does not compute (biases, other activations, other rope types).
        """
        if hf.get("model_type") != "llama":
            raise ValueError(f"model_type is {hf.get('model_type')!r}, expected 'llama'; use a Llama checkpoint")
        derived = ("kv_heads", "head_dim")
        missing = [key for name, key in _SIZES.items() if name not in derived and hf.get(key) is None]
        if missing:
            raise ValueError(
                f"missing {', '.join(missing)} (absent or null); take config.json from the original checkpoint"
            )
        for key in ("attention_bias", "mlp_bias"):
            if hf.get(key):
                raise ValueError(f"{key} is {hf[key]!r}; only Llamas without biases are supported")
        if hf.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
            raise ValueError(f"hidden_act is {hf['hidden_act']!r}; only 'silu' is supported")
        if hf.get("transformers_weights") not in (None, "model.safetensors"):
            raise ValueError(
                f"transformers_weights is {hf['transformers_weights']!r}; only weights in model.safetensors, or in the "
                "shards of its index, are supported: rename the file, and remove the key"
            )
        sizes = {name: _whole(key, hf[key]) for name, key in _SIZES.items() if hf.get(key) is not None}
        if sizes["layers"] > _MOST_LAYERS:
            raise ValueError(f"num_hidden_layers is {sizes['layers']}; it must be at most {_MOST_LAYERS:,}")
        width, heads = sizes["width"], sizes["heads"]
        if "head_dim" not in sizes and width % heads:
            raise ValueError(f"hidden_size {width} is not a multiple of num_attention_heads {heads}; set head_dim")
        values: dict[str, Any] = {"norm_eps": 1e-6, "kv_heads": heads, "head_dim": width // heads, **sizes}
        for name, (key, read) in _OPTIONS.items():
            if key in hf:
                values[name] = read(key, hf[key])
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

    They are counted as `DecoderConfig.layer_index` counts them, evenly spaced, and end with the last. Of fewer layers
    than `count`, some repeat: (2, 4) gives 1, 1, 2, 2.
    """
    return tuple(-(-layers * (i + 1) // count) for i in range(count))
