"""The model families that the decoder computes, by what sets each apart, and what a config.json of them says.

All are decoders of one shape: RMSNorm, rotary grouped-query attention and SwiGLU. A family is what its `model_type`
adds to that without a word in config.json, the switches that it reads there, and what a key that is left out means:
transformers and ours must fill it with the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rtd_jax.models.config_values import flag, shown, whole

_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Family:
    """What sets the models of one `model_type` apart from Llama's."""

    architecture: str  # the class in transformers
    always: tuple[str, ...] = ()  # flags of DecoderConfig
    switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # keys of config.json, and flags they set
    left_out: Mapping[str, Any] = field(default_factory=dict)  # what a key means that config.json has not
    windows: Literal["none", "all", "by_layer"] = "none"  # layers that `sliding_window` is about
    unrotated: bool = False  # whether config.json says which layers have no rotary embedding
    usual_theta: float = 10_000.0  # the rotary base where config.json gives none
    whole_heads: bool = False  # transformers reads no folder whose width is not a multiple of its query heads


_BIASES = {"attention_bias": ("qkv_bias", "output_bias")}
FAMILIES: dict[str, Family] = {
    # Llama 1 to 3.3, SmolLM and SmolLM2, TinyLlama, Yi, DeepSeek's first distillations: a Llama in config.json too.
    "llama": Family("LlamaForCausalLM", switches=_BIASES | {"mlp_bias": ("mlp_bias",)}, whole_heads=True),
    # 7B, Nemo (heads narrower than width / heads), Small.
    "mistral": Family(
        "MistralForCausalLM",
        left_out={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131_072},
        windows="all",
    ),
    # Qwen2 and 2.5, DeepSeek-R1-Distill-Qwen.
    "qwen2": Family(
        "Qwen2ForCausalLM",
        always=("qkv_bias",),
        left_out={"num_key_value_heads": 32, "max_position_embeddings": 32_768},
        windows="by_layer",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        always=("qk_norm",),
        switches=_BIASES,
        left_out={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32_768},
        windows="by_layer",
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        switches=_BIASES | {"mlp_bias": ("mlp_bias",)},
        left_out={
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "max_position_embeddings": 32_768,
            "sliding_window": None,
        },
        windows="by_layer",
        unrotated=True,
        usual_theta=2_000_000.0,
    ),
}

# Of what people ask for most often: what the decoder would need.
_NEEDED = {
    "phi3": "fused q, k, v and gate, up matrices and a rotary embedding of a part of each head (longrope)",
    "gemma": "norms that add one to their scale, scaled embeddings and GELU",
    "gemma2": "norms after attention and MLP, capped logits and scaled embeddings",
    "gemma3_text": "norms after attention and MLP, scaled embeddings and another rotary base for some layers",
    "qwen3_next": "linear attention and a mixture of experts",
    "gpt_oss": "a mixture of experts and attention sinks",
    "ministral": "the sliding windows of its own model_type",
    "ministral3": "queries scaled by their position",
}
# Keys by which the kind of an unknown model shows.
_SHOWN_BY = {
    "a mixture of experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"),
    "latent attention (MLA)": ("kv_lora_rank",),
    "a text model inside a multimodal one": ("text_config", "vision_config"),
}


def family_of(hf: dict[str, Any]) -> Family:
    """The family that a config.json is of.

    Raises:
      ValueError: the decoder does not compute it. Says what it would need, where that is known.
    """
    name = hf.get("model_type")
    known = f"supported: {', '.join(FAMILIES)}"
    if not isinstance(name, str):
        raise ValueError(f"model_type is {shown(name)}; expected one of the families that are {known}")
    needed = [what for what, keys in _SHOWN_BY.items() if any(hf.get(key) not in (None, 0) for key in keys)]
    needed += [_NEEDED[name]] if name in _NEEDED and not needed else []
    if name not in FAMILIES:
        because = f", a model with {' and '.join(needed)}" if needed else ""
        raise ValueError(f"model_type is {name!r}{because}, which the decoder does not compute; {known}")
    return FAMILIES[name]


def features_of(hf: dict[str, Any], family: Family, layers: int) -> dict[str, Any]:
    """The arguments of `DecoderConfig` that tell a model of the family from a plain Llama.

    Args:
      hf: a config.json, with what its family means by the keys that it leaves out.

    Raises:
      ValueError: a value that cannot be, or two that contradict each other.
    """
    found: dict[str, Any] = dict.fromkeys(family.always, True)
    for key, flags in family.switches.items():
        found |= dict.fromkeys(flags, True) if hf.get(key) is not None and flag(key, hf[key]) else {}
    unrotated = _unrotated(hf, layers) if family.unrotated else ()
    window, windowed = _windows(hf, family, layers, unrotated)
    return found | {"unrotated_layers": unrotated, "window": window, "windowed_layers": windowed}


def _unrotated(hf: dict[str, Any], layers: int) -> tuple[int, ...]:
    """The layers without rotary embedding: those of 0 in `no_rope_layers`, or every nth."""
    listed = hf.get("no_rope_layers")
    if listed is None:
        interval = whole("no_rope_layer_interval", hf.get("no_rope_layer_interval", 4))
        return tuple(range(interval - 1, layers, interval))
    if not isinstance(listed, list) or len(listed) < layers or any(one not in (0, 1) for one in listed):
        raise ValueError(
            f"no_rope_layers is {shown(listed)}; expected a list of {layers} numbers, 1 for a layer with rotary "
            "embedding and 0 for one without"
        )
    return tuple(layer for layer in range(layers) if not listed[layer])


def _windows(
    hf: dict[str, Any], family: Family, layers: int, unrotated: tuple[int, ...]
) -> tuple[int | None, tuple[int, ...]]:
    """The tokens that a windowed layer sees, and which layers are windowed; (None, ()) where none is."""
    if family.windows == "none":
        return None, ()
    switch = family.windows == "all" or flag("use_sliding_window", hf.get("use_sliding_window", False))
    given = hf.get("sliding_window", 4096)
    window = whole("sliding_window", given) if switch and given is not None else None  # unread where it is off
    if family.windows == "all":
        return window, tuple(range(layers)) if window else ()
    switched_on = window is not None
    kinds = hf.get("layer_types")
    if kinds is None and not switched_on:
        return None, ()
    if kinds is None:
        first = hf.get("max_window_layers", 28)
        if type(first) is not int or first < 0:
            raise ValueError(f"max_window_layers is {shown(first)}; expected a number of layers")
        windowed = unrotated if family.unrotated else tuple(range(first, layers))
        return (window, windowed) if windowed else (None, ())
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in (_FULL, _SLIDING) for kind in kinds):
        raise ValueError(f"layer_types is {shown(kinds)}; expected {layers} of {_FULL!r} and {_SLIDING!r}")
    windowed = tuple(layer for layer, kind in enumerate(kinds) if kind == _SLIDING)
    if windowed and not switched_on:
        raise ValueError(
            f"layer_types has {_SLIDING!r}, but use_sliding_window is {hf.get('use_sliding_window', False)} and "
            f"sliding_window {given}; make all layers {_FULL!r}, or switch the window on"
        )
    return (window, windowed) if windowed else (None, ())


def features_to_hf(family: Family, config: Any) -> dict[str, Any]:
    """The entries of config.json that `features_of` reads, of a `DecoderConfig`."""
    found: dict[str, Any] = {key: getattr(config, flags[0]) for key, flags in family.switches.items()}
    windowed = set(config.windowed_layers)
    if family.windows == "all":
        found["sliding_window"] = config.window
    elif family.windows == "by_layer":
        found["use_sliding_window"] = config.window is not None
        found["sliding_window"] = config.window
        found["max_window_layers"] = min(windowed, default=config.layers)
        found["layer_types"] = [_SLIDING if layer in windowed else _FULL for layer in range(config.layers)]
    if family.unrotated:
        found["no_rope_layers"] = [int(layer not in config.unrotated_layers) for layer in range(config.layers)]
    return found
