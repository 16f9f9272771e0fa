"""The teacher's outputs for a batch, by a forward pass or from a cache on disk; and the head that scores steps."""
