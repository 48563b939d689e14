"""Meta-learning: an equilibrium model adapts to a task by its context, found by joint inference."""
