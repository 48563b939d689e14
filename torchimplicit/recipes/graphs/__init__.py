"""Implicit graph neural networks on molecules, proteins and chains (Geng et al. 2021, arXiv 2111.05177, table 4)."""
