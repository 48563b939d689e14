"""Phantom gradients: recipes, and the tables of On Training Implicit Models (Geng et al. 2021)."""
