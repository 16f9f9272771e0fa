"""The description of a model (family, sizes, rotary embedding, special token ids), and how its layers are counted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from rtd_jax.models.config_values import flag, positive, share, token_ids, whole
from rtd_jax.models.families import FAMILIES, family_of, features_of, features_to_hf
from rtd_jax.models.rope import RopeConfig

_MOST_LAYERS = 10_000
_PLAIN, _PLAIN_ROPE = 15, 6  # fields of the two descriptions that a plain Llama has, which come first

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
    "norm_eps": ("rms_norm_eps", positive),
    "tied_embeddings": ("tie_word_embeddings", flag),
    "max_positions": ("max_position_embeddings", whole),
    "init_std": ("initializer_range", share),
    "bos_token_id": ("bos_token_id", token_ids),
    "eos_token_id": ("eos_token_id", token_ids),
    "pad_token_id": ("pad_token_id", token_ids),
}
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def special_ids(hf: dict[str, Any]) -> dict[str, Any]:
    """The ids of special tokens in a config.json or generation_config.json, as arguments of `DecoderConfig`.

    Raises:
      ValueError: one is no token id, nor a list of them.
    """
    return {key: token_ids(key, hf[key]) for key in _SPECIAL if key in hf}


def as_ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    """The ids of a special token as config.json gives it: one, several, or none."""
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


@dataclass(frozen=True)
class DecoderConfig:
    """The description of a model. Hashable, so it can be a static argument of jit.

    Raises:
      ValueError: impossible sizes, or layers that do not exist.
    """

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
    family: str = "llama"  # the model_type that it is read and written as
    qkv_bias: bool = False  # queries, keys and values have a bias
    output_bias: bool = False  # the matrix after attention has a bias
    mlp_bias: bool = False  # the MLP's three matrices have a bias
    qk_norm: bool = False  # RMSNorm of each query and key head before it is rotated
    unrotated_layers: tuple[int, ...] = ()  # layers without rotary embedding, from 0
    window: int | None = None  # tokens that a token of a windowed layer attends to, itself included
    windowed_layers: tuple[int, ...] = ()  # from 0

    def __post_init__(self) -> None:
        for name in (*_SIZES, "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"DecoderConfig.{name} is {getattr(self, name)}; it must be at least 1")
        if self.family not in FAMILIES:
            raise ValueError(f"DecoderConfig.family is {self.family!r}; use one of {', '.join(FAMILIES)}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"DecoderConfig.heads {self.heads} is not a multiple of kv_heads {self.kv_heads}; use a divisor of "
                f"{self.heads} for kv_heads (in config.json, num_attention_heads and num_key_value_heads)"
            )
        if self.head_dim % 2:
            raise ValueError(f"DecoderConfig.head_dim {self.head_dim} is odd; rotary embedding needs pairs")
        for name in ("unrotated_layers", "windowed_layers"):
            if not set(getattr(self, name)) <= set(range(self.layers)):
                raise ValueError(
                    f"DecoderConfig.{name} is {getattr(self, name)}, but there are layers 0 to {self.layers - 1}; "
                    "`of_layers` gives a model with fewer layers"
                )
        if bool(self.windowed_layers) != (self.window is not None) or (self.window is not None and self.window < 1):
            raise ValueError(
                f"DecoderConfig.window is {self.window} and windowed_layers {self.windowed_layers}; give both, or none"
            )
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
          ValueError: a family that is not supported, a value that is missing, impossible or contradicts another one, or
            what this decoder does not compute (other activations, other rope types).
        """
        family = family_of(hf)
        hf = {**family.left_out, **hf}
        derived = ("kv_heads", "head_dim")
        missing = [key for name, key in _SIZES.items() if name not in derived and hf.get(key) is None]
        if missing:
            raise ValueError(
                f"missing {', '.join(missing)} (absent or null); take config.json from the original checkpoint"
            )
        if hf.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
            raise ValueError(f"hidden_act is {hf['hidden_act']!r}; only 'silu' is supported")
        if hf.get("transformers_weights") not in (None, "model.safetensors"):
            raise ValueError(
                f"transformers_weights is {hf['transformers_weights']!r}; only weights in model.safetensors, or in the "
                "shards of its index, are supported: rename the file, and remove the key"
            )
        sizes = {name: whole(key, hf[key]) for name, key in _SIZES.items() if hf.get(key) is not None}
        if sizes["layers"] > _MOST_LAYERS:
            raise ValueError(f"num_hidden_layers is {sizes['layers']}; it must be at most {_MOST_LAYERS:,}")
        width, heads = sizes["width"], sizes["heads"]
        if "head_dim" not in sizes and width % heads:
            raise ValueError(f"hidden_size {width} is not a multiple of num_attention_heads {heads}; set head_dim")
        values: dict[str, Any] = {"norm_eps": 1e-6, "kv_heads": heads, "head_dim": width // heads, **sizes}
        for name, (key, read) in _OPTIONS.items():
            if key in hf:
                values[name] = read(key, hf[key])
        rope = RopeConfig.from_hf(hf, theta=family.usual_theta)
        return cls(**values, **features_of(hf, family, sizes["layers"]), rope=rope, family=hf["model_type"])

    def of_layers(self, layers: Sequence[int]) -> "DecoderConfig":
        """The description of a model of some of the layers, counted from 0, in this order."""

        def kept(of: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(place for place, layer in enumerate(layers) if layer in of)

        windowed = kept(self.windowed_layers)
        return replace(
            self,
            layers=len(layers),
            unrotated_layers=kept(self.unrotated_layers),
            windowed_layers=windowed,
            window=self.window if windowed else None,
        )

    def check_readable(self) -> None:
        """Raises ValueError where transformers would not read a folder of such a model. It begins with the size."""
        if FAMILIES[self.family].whole_heads and self.width % self.heads:
            raise ValueError(
                f"width is {self.width}, no multiple of the {self.heads} query heads: transformers reads no such "
                f"{self.family}; give a multiple of {self.heads}"
            )

    @property
    def identity(self) -> str:
        """A text that is equal for equal descriptions, by which a checkpoint knows them.

        It is that of before there were other families, with what is not a plain Llama's behind it, so that checkpoints
        of then are known.
        """

        def listed(of: Any, first: int) -> str:
            own = fields(of)
            shown = [*own[:first], *(one for one in own[first:] if getattr(of, one.name) != one.default)]
            values = {one.name: getattr(of, one.name) for one in shown}
            texts = {
                name: listed(x, _PLAIN_ROPE) if isinstance(x, RopeConfig) else repr(x) for name, x in values.items()
            }
            name = "LlamaConfig" if of is self else type(of).__name__
            return f"{name}({', '.join(f'{key}={text}' for key, text in texts.items())})"

        return listed(self, _PLAIN)

    @property
    def layers_differ(self) -> bool:
        """Whether some layers are computed in another way than others, so that a layer cannot stand for another."""
        return any(0 < len(of) < self.layers for of in (self.unrotated_layers, self.windowed_layers))

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
        """The content of a `config.json` that `transformers` reads as a model of the family."""
        family = FAMILIES[self.family]
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        return {
            "architectures": [family.architecture],
            "model_type": self.family,
            **{key: values[name] for name, key in _SIZES.items()},
            "hidden_act": "silu",
            **features_to_hf(family, self),
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
