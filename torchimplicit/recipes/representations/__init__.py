"""Implicit representations of pictures, sounds, videos and shapes, and their tables (Huang et al. 2021)."""
