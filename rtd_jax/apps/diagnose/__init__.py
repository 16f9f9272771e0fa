"""Do student and teacher follow the same trajectory? What `launch/diagnose.py` runs."""
