"""The step judge: which steps of a solution are right, which one is the first wrong one, and why; without a model."""
