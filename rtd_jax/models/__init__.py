"""Llama in JAX: description, pure functions, and Hugging Face checkpoints in and out."""

from rtd_jax.models.config import LlamaConfig, RopeConfig, layers_to_copy, layers_to_match
from rtd_jax.models.decoder import KVCache
from rtd_jax.models.from_hf import load_config, load_params, resolve
from rtd_jax.models.model import LlamaModel
from rtd_jax.models.to_hf import save_pretrained
from rtd_jax.models.weights import logical_axes

__all__ = [
    "KVCache",
    "LlamaConfig",
    "LlamaModel",
    "RopeConfig",
    "layers_to_copy",
    "layers_to_match",
    "load_config",
    "load_params",
    "logical_axes",
    "resolve",
    "save_pretrained",
]
