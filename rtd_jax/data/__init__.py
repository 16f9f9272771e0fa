"""From text to batches: traces, sources, generators, tokens and boundaries, packing, batching by length, the loader."""
