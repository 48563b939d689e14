"""What a recipe consists of: settings, and a runner for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from torchimplicit.recipes.run import Run


class Runner(Protocol):
    """Runs a recipe's settings: a module, or an object.

    The settings are a frozen dataclass, each field with a docstring that ``--help`` shows. Settings that make no sense
    raise :class:`~torchimplicit.recipes.errors.UserError` when they are made. Their module imports nothing heavy: the
    command line makes settings only to show their help.
    """

    def check(self, config: Any) -> None:
        """Raise :class:`~torchimplicit.recipes.errors.UserError` where this machine cannot run it."""

    def train(self, config: Any, run: Run, console: Console) -> bool:
        """Train, from the run's last checkpoint if it has one, and write the results into the run's directory.

        Returns:
            Whether training went to its end. ``False``: it was interrupted, and what was done is written.
        """

    def evaluate(self, config: Any, run: Run, console: Console) -> None:
        """Measure again from what the run holds, and write ``evaluation.json``."""


@runtime_checkable
class Exporter(Protocol):
    """A runner that can write what a run has learnt at another size."""

    def export(self, config: Any, sizes: tuple[int, ...], run: Run, console: Console) -> Path:
        """Write it into the run's directory.

        Args:
            config: the run's.
            sizes: as typed; the recipe says what they mean.
            run: where the weights are.
            console: for progress.

        Returns:
            the file.

        Raises:
            UserError: if there are no weights yet, or the sizes make no sense.
        """
