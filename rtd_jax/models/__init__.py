"""Llama in JAX: its config, its functions on params, and reading and writing Hugging Face checkpoints.

`rtd_jax.models.open` opens a whole model, tokenizer included; it is not imported here because transformers is slow to
import.
"""

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
