"""Tiny random models of every family made by transformers, in every shape that rtd_jax computes: the reference."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

VOCAB = 61
# Weights large enough that attention is far from uniform, so that a wrong angle, scale or mask shows in the logits.
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Original context of 32: of the eight frequencies some are kept, some blended, some divided by the factor.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16}
WINDOW = 7  # tokens, far less than the tests' rows
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa_with_wide_heads": {"num_key_value_heads": 1, "head_dim": 16},
    "tied": {"tie_word_embeddings": True},
    "large_eps": {"rms_norm_eps": 0.1},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    "llama3": {"rope_parameters": LLAMA3_ROPE, "head_dim": 16, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 3.0}},
    "yarn": {"rope_parameters": YARN_ROPE, "head_dim": 16},
    "yarn_by_factors": {
        "rope_parameters": YARN_ROPE
        | {"beta_fast": 4.0, "beta_slow": 0.5, "mscale": 0.7, "mscale_all_dim": 1.4, "truncate": False},
        "head_dim": 16,
    },
    "llama_biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral_nemo": {"model_type": "mistral", "sliding_window": None, "head_dim": 16, "num_key_value_heads": 1},
    "mistral_window": {"model_type": "mistral", "sliding_window": WINDOW},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_untied": {"model_type": "qwen2", "rms_norm_eps": 1e-5},
    "qwen2_windows_above": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen2_yarn": {"model_type": "qwen2", "rope_parameters": YARN_ROPE},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3_tied": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True, "rope_parameters": YARN_ROPE},
    "qwen3_biases": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True},
    "qwen3_windows_by_layer": {
        "model_type": "qwen3",
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "smollm3": {"model_type": "smollm3", "pad_token_id": 0, "no_rope_layer_interval": 2, "tie_word_embeddings": True},
    "smollm3_listed": {
        "model_type": "smollm3",
        "pad_token_id": 0,
        "no_rope_layers": [0, 1, 0],
        "attention_bias": True,
        "mlp_bias": True,
    },
    "smollm3_windows": {
        "model_type": "smollm3",
        "pad_token_id": 0,
        "no_rope_layers": [1, 0, 1],
        "use_sliding_window": True,
        "sliding_window": WINDOW,
    },
}


def hf_model(model_type: str = "llama", **changes: Any) -> transformers.PreTrainedModel:
    """A random causal model in float32; norms are moved away from one and biases from zero, where they would hide."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**BASE, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                weight.normal_(0.0, 0.5)
    return model


def rewrite_config(directory: Path, change) -> None:
    """Applies `change` to the dict in config.json."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def old_spelling(config: dict[str, Any]) -> None:
    """config.json as transformers 4 wrote it: top-level rope_theta and rope_scaling."""
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")


def random_tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, length)).astype(np.int32)


def positions(rows: int, length: int) -> np.ndarray:
    return np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
