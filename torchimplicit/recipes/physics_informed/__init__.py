"""Physics-informed equilibrium models beside plain networks, on four equations, with three optimizers."""
