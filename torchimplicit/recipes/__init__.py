"""Experiments that one command reproduces. Nothing imports this package; the command line finds recipes by name.

A recipe is a function that returns a typed config, and the config knows how to run itself
(:class:`torchimplicit.recipes.recipe.Recipe`). To add one, write it in a file or folder of its own and give it a line
in :mod:`torchimplicit.recipes.registry`. Everything here needs the ``recipes`` extra.
"""
