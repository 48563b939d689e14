"""Image classification with multiscale deep equilibrium models (Geng et al. 2021, arXiv 2111.05177)."""
