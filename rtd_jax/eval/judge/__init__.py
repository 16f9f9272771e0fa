"""Which step of a solution is the first wrong one: by rules, or as a served model says."""
