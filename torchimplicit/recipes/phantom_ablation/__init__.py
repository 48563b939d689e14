"""Implicit and phantom training of an image classifier: Table 1 and Fig. 3 of Geng et al. (2021, arXiv 2111.05177)."""
