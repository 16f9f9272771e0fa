"""Chains of thought written by a teacher, kept where their answer is right (launch/traces.py)."""
