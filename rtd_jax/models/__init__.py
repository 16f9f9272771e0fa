"""Llama in JAX: its config, its functions on params, and reading and writing Hugging Face checkpoints."""
