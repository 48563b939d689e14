"""The figures of the table, from its runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torchimplicit.recipes.phantom_graphs.config import PhantomGraphsConfig
from torchimplicit.recipes.phantom_graphs.cost import StepCost
from torchimplicit.recipes.phantom_graphs.jobs import CHAINS, rows
from torchimplicit.recipes.plain import from_plain
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.training.results import Results


@dataclass(frozen=True)
class Row:
    """One estimator on one set.

    Attributes:
        damping: λ; ``None``: the implicit gradient.
        accuracy: test accuracy by fold, at the epoch of the least validation loss.
        peeked: by fold, the best test accuracy of any epoch: how the published figures were selected.
        forward, backward: evaluations a step over all layers, mean over folds; ``nan`` if there are none.
    """

    damping: float | None
    accuracy: dict[int, float]
    peeked: dict[int, float]
    forward: float
    backward: float


@dataclass(frozen=True)
class Found:
    """Everything.

    Attributes:
        sets: the rows of each set, by their names.
        chains: test accuracies of each variant by length, one a seed.
        costs: of each set and row, timed in turn.
        diverged: the names of the runs that did not end well.
        raw: figures of every run.
    """

    sets: dict[str, dict[str, Row]]
    chains: dict[str, dict[int, list[float]]]
    costs: dict[str, dict[str, StepCost]]
    diverged: list[str]
    raw: dict[str, Any]


def read(config: PhantomGraphsConfig, runs: Mapping[str, Run]) -> Found:
    """What the runs have left; those that are missing are left out."""
    results: dict[str, Results] = {}
    diverged = []
    for name, run in runs.items():
        if name.startswith("cost-"):
            continue
        one = Results.of(run) if (run.path / "results.json").is_file() else None
        if one is None or one.state != "complete" or one.test is None or one.best is None:
            diverged.append(name)
        else:
            results[name] = one
    chains: dict[str, dict[int, list[float]]] = {variant: {} for variant in CHAINS}
    for variant in CHAINS:
        for length in config.lengths:
            names = [f"chains-{length}-{variant}-{seed}" for seed in config.plan.all_seeds]
            if there := [_accuracy(results[name]) for name in names if name in results]:
                chains[variant][length] = there
    costs: dict[str, dict[str, StepCost]] = {
        name: {row: from_plain(StepCost, plain) for row, plain in runs[f"cost-{name.lower()}"].read_json(COSTS).items()}
        for name in config.sets
        if f"cost-{name.lower()}" in runs and (runs[f"cost-{name.lower()}"].path / COSTS).is_file()
    }
    sets: dict[str, dict[str, Row]] = {
        name: {row: _row(config, name, row, results) for row in rows(config)} for name in config.sets
    }
    return Found(sets, chains, costs, diverged, {name: _raw(one) for name, one in results.items()})


COSTS = "costs.json"


def _row(config: PhantomGraphsConfig, name: str, row: str, results: Mapping[str, Results]) -> Row:
    there = {
        fold: results[f"{name.lower()}-fold{fold}-{row}"]
        for fold in range(config.folds)
        if f"{name.lower()}-fold{fold}-{row}" in results
    }
    steps = [one.costs for one in there.values() if one.costs is not None]
    return Row(
        damping=rows(config)[row],
        accuracy={fold: _accuracy(one) for fold, one in there.items()},
        peeked={fold: max(v.figures["test_accuracy"] for v in one.validations) for fold, one in there.items()},
        forward=fmean(cost.forward for cost in steps) if steps else float("nan"),
        backward=fmean(cost.backward for cost in steps) if steps else float("nan"),
    )


def _accuracy(one: Results) -> float:
    assert one.test is not None
    return one.test.figures["accuracy"]


def _raw(one: Results) -> dict[str, Any]:
    assert one.best is not None
    peeked = [v.figures["test_accuracy"] for v in one.validations if "test_accuracy" in v.figures]
    return {
        "test_accuracy": _accuracy(one),
        "selected_step": one.best.step,
        "validation": one.best.figures,
        "best_test_accuracy_of_any_epoch": max(peeked) if peeked else None,
        "seconds": one.seconds,
        "forward_evaluations": one.costs.forward if one.costs else None,
        "backward_evaluations": one.costs.backward if one.costs else None,
    }
