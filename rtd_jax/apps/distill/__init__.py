"""Distilling a student: what `launch/train.py` runs."""
