"""How many terms of the adjoint's series a fit needs (Huang et al. 2021, figure 4)."""
