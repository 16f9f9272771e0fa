"""Where the teacher's outputs come from."""
