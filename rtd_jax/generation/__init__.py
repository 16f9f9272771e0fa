"""Text out of a model: batched greedy decoding with a key/value cache."""

from rtd_jax.generation.decode import generate, greedy

__all__ = ["generate", "greedy"]
