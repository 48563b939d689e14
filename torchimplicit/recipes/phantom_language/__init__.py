"""Table 3 of Geng et al. (2021), its language models: implicit and phantom gradients, and Jacobian regularization."""
