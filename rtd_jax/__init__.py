"""Reasoning Trace Distillation in JAX: keep a teacher's multi-step reasoning in a much smaller student."""
