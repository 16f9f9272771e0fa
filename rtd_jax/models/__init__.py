"""Llama and its kin in JAX: its config, its functions on params, and reading and writing Hugging Face checkpoints."""
