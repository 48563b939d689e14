"""The recipes by name. Looking one up imports that one only."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module

from torchimplicit.recipes.errors import UserError
from torchimplicit.recipes.recipe import Recipe


@dataclass(frozen=True)
class Entry:
    """Where a recipe is.

    Attributes:
        module, function: the function that returns the recipe's default config.
        summary: one line for ``torchimplicit list``.
    """

    module: str
    function: str
    summary: str


RECIPES = {
    "demo": Entry(
        "torchimplicit.recipes.digits",
        "demo",
        "Three gradient estimators side by side on 8×8 digits, with pictures, in under three minutes.",
    ),
    "digits": Entry(
        "torchimplicit.recipes.digits",
        "digits",
        "One convolutional equilibrium classifier of 8×8 digits, with the estimator of your choice.",
    ),
}
"""Every recipe, in the order in which it is listed."""


def entry(name: str) -> Entry:
    """The recipe's entry.

    Raises:
        UserError: if there is no such recipe.
    """
    if name in RECIPES:
        return RECIPES[name]
    close = get_close_matches(name, RECIPES, n=1)
    hint = f"did you mean '{close[0]}'?" if close else "see 'torchimplicit list'"
    raise UserError(f"there is no recipe '{name}'; the recipes are {', '.join(RECIPES)}; {hint}")


def load(name: str) -> Recipe:
    """The recipe's default config."""
    where = entry(name)
    config = getattr(import_module(where.module), where.function)()
    assert isinstance(config, Recipe), f"{name} is no recipe"
    return config
