"""Chains of thought that a teacher writes, kept where their answer is right (launch/traces.py)."""
