"""Training by optimizers that take the whole objective in every iteration: Gauss-Newton, L-BFGS, and Adam for
comparison."""
