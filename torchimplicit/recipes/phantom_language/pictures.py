"""The table's figures."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from torchimplicit.recipes.phantom_language.trained import Trained
from torchimplicit.recipes.plotting import axes, style
from torchimplicit.recipes.runtime.table import Drawing


def against_steps(trained: dict[str, Trained]) -> Drawing:
    """Validation perplexity over the steps."""
    return _curves(
        "perplexity-steps",
        trained,
        "Optimizer steps",
        lambda one: 1.0,
        "Perplexity on the validation text along training, mean over the seeds. Lower is better; lines that lie on "
        "each other learn the same from a step.",
    )


def against_seconds(trained: dict[str, Trained]) -> Drawing:
    """Validation perplexity over the time."""
    return _curves(
        "perplexity-seconds",
        {name: one for name, one in trained.items() if one.step_seconds is not None},
        "Seconds of training",
        lambda one: one.step_seconds or 0.0,
        "The same against time: steps times the seconds of a step, which were measured for all rows in turn. A line "
        "further to the left learns as much in less time.",
    )


def _curves(
    name: str, trained: dict[str, Trained], label: str, scale: Callable[[Trained], float], caption: str
) -> Drawing:
    figure, (ax,) = axes()
    for index, one in enumerate(trained.values()):
        found: dict[int, list[float]] = {}
        for result in one.results:
            for validation in result.validations:
                found.setdefault(validation.step, []).append(validation.figures["perplexity"])
        steps = sorted(found)
        ax.plot(
            [scale(one) * step for step in steps],
            [fmean(found[step]) for step in steps],
            label=one.row.label,
            **style(index),
        )
    ax.set_yscale("log")
    ax.set_xlabel(label)
    ax.set_ylabel("Validation perplexity")
    ax.legend()
    return Drawing(name, figure, caption)
