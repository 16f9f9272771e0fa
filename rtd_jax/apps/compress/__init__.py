"""Students made smaller: rounded to a few bits, or pruned, and what that costs at each depth of reasoning."""
