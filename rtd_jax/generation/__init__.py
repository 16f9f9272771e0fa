"""Text out of a model: batched decoding, greedy or sampled, with a key/value cache."""

from rtd_jax.generation.decode import Sampling, generate, greedy

__all__ = ["Sampling", "generate", "greedy"]
