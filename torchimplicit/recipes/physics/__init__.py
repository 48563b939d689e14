"""Physics-informed models: equilibrium models that solve differential equations, compared with plain networks.

An equation (:mod:`.statement`) says what a function and its derivatives make zero, and where; a problem of least
squares (:mod:`.least_squares`) makes a vector and its exact Jacobian of it; an optimizer lowers it
(:mod:`.solve_equation`).
"""
