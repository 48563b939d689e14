"""Physics-informed models: an equilibrium model solves differential equations, beside a plain network.

An equation (:mod:`.equations`) states residuals of a function and its derivatives at collocation points; a problem of
least squares (in :mod:`.solve_equation`) makes a vector and its exact Jacobian of them; an optimizer lowers it.
"""
