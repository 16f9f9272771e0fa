"""From text to batches: traces, sources, the synthetic generator, tokens and boundaries, packing, the grain loader."""
