"""Experiments that one command reproduces. Nothing imports this package; the command line finds recipes by name.

A recipe is a function that returns settings, and a runner for them (:class:`torchimplicit.recipes.runtime.run.Runner`).
To add one, write it in a file of its own and give it a line in :mod:`torchimplicit.recipes.registry`. Everything here
needs the ``recipes`` extra.
"""
