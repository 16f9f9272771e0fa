"""The trainer: state, optimizer, step, stages, checkpoints. Everything else meets here."""
