"""Tiny random Llamas made by transformers, in every shape that rtd_jax computes: the reference of the model tests."""

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
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa_with_wide_heads": {"num_key_value_heads": 1, "head_dim": 16},
    "tied": {"tie_word_embeddings": True},
    "large_eps": {"rms_norm_eps": 0.1},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    "llama3": {"rope_parameters": LLAMA3_ROPE, "head_dim": 16, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
}


def hf_model(**changes: Any) -> transformers.LlamaForCausalLM:
    """A random LlamaForCausalLM in float32; norms are moved away from one, where they would hide."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**BASE, **changes})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
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
