"""Greedy or sampled decoding with a key/value cache and continuous batching."""

from rtd_jax.eval.decoding.run import generate
from rtd_jax.eval.decoding.settings import PROMPT_MULTIPLE, GenerateSettings, Sampling

__all__ = ["PROMPT_MULTIPLE", "GenerateSettings", "Sampling", "generate"]
