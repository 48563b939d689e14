"""What a recipe's config must be able to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from rich.console import Console

    from torchimplicit.recipes.run import Run


@runtime_checkable
class Recipe(Protocol):
    """A frozen dataclass of settings, each with a docstring that ``--help`` shows.

    Settings that make no sense raise :class:`~torchimplicit.recipes.errors.UserError` when the config is made. Heavy
    imports belong inside the methods: the command line makes configs only to show their help.
    """

    def check(self) -> None:
        """Raise :class:`~torchimplicit.recipes.errors.UserError` where this machine cannot run it."""

    def train(self, run: Run, console: Console) -> bool:
        """Train, from the run's last checkpoint if it has one, and write the results into the run's directory.

        Returns:
            Whether training went to its end. ``False``: it was interrupted, and what was done is written.
        """

    def evaluate(self, run: Run, console: Console) -> None:
        """Measure the trained model again from the run's last checkpoint, and write ``evaluation.json``."""
