"""What every part shares: batch and output types, masked reductions, sharding, safe file writes."""
