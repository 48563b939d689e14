"""Sounds as fields of time: fitted, and sampled at any rate."""
