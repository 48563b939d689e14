"""Graph classification on every fold of a TU data set, including your own, with the accuracy on each."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from torchimplicit.recipes.phantom.graphs import RUNNER, MoleculesConfig, tu
from torchimplicit.recipes.runtime.run import Run, Runner
from torchimplicit.recipes.runtime.table import Cell, Table, sheet
from torchimplicit.recipes.runtime.trainer import Results

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class FoldsConfig:
    """Train on every fold of a cross-validation; --fold is ignored."""

    training: MoleculesConfig = field(default_factory=lambda: tu())


def folds() -> FoldsConfig:
    """Settings of one fold, applied to all."""
    return FoldsConfig()


class Folds(Runner):
    """Trains the folds one after another, in subfolders of the run. A resumed run continues where it stopped."""

    def check(self, config: FoldsConfig) -> None:
        RUNNER.check(config.training)

    def train(self, config: FoldsConfig, run: Run, console: Console) -> bool:
        for fold in range(config.training.folds):
            fold_run, settings = self._fold(config, run, fold)
            if _done(fold_run):
                continue
            for folder in ("checkpoints", "logs"):
                (fold_run.path / folder).mkdir(parents=True, exist_ok=True)
            if not (fold_run.path / "run.json").is_file():
                fold_run.describe("graphs-tu", settings)
            console.rule(f"Fold {fold + 1} of {config.training.folds}")
            if not RUNNER.train(settings, fold_run, console):
                return False
            fold_run.mark("complete")
        self.evaluate(config, run, console)
        return True

    def evaluate(self, config: FoldsConfig, run: Run, console: Console) -> None:
        results = []
        for fold in range(config.training.folds):
            fold_run, _ = self._fold(config, run, fold)
            if _done(fold_run):
                results.append(_figures(fold, Results.of(fold_run)))
        run.write_json("folds.json", {"folds": results})
        from torchimplicit.recipes.runtime.page import Section, document

        run.write_text("index.html", document("Every fold", [], [Section(table=summary(results))]))
        console.print(summary(results).rich_rows(console.width))

    @staticmethod
    def _fold(config: FoldsConfig, run: Run, fold: int) -> tuple[Run, MoleculesConfig]:
        return Run(run.path / f"fold-{fold}"), replace(config.training, fold=fold)


def _done(run: Run) -> bool:
    return (run.path / "results.json").is_file() and run.read_json("results.json")["state"] == "complete"


def _figures(fold: int, results: Results) -> dict[str, Any]:
    assert results.test is not None
    assert results.best is not None
    peeked = [v.figures["test_accuracy"] for v in results.validations if "test_accuracy" in v.figures]
    return {
        "fold": fold,
        "accuracy": results.test.figures["accuracy"],
        "step": results.best.step,
        "best_of_any_epoch": max(peeked) if peeked else None,
    }


def summary(results: list[dict[str, Any]]) -> Table:
    """A row per fold, then mean and standard deviation."""

    def over(name: str) -> str:
        values = [100 * one[name] for one in results if one[name] is not None]
        return f"{fmean(values):.1f} ± {stdev(values) if len(values) > 1 else 0:.1f}" if values else "–"

    mean = {"fold": "mean", "step": "", "accuracy": over("accuracy"), "best_of_any_epoch": over("best_of_any_epoch")}

    def percent(name: str) -> Any:
        def cell(one: dict[str, Any]) -> str:
            value = one[name]
            return value if isinstance(value, str) else "–" if value is None else f"{100 * value:.1f}"

        return cell

    return sheet("", [*results, mean], [
        Cell("Fold", lambda one: str(one["fold"])),
        Cell("Test accuracy", percent("accuracy"), "%", "at the epoch of the best validation"),
        Cell("At step", lambda one: str(one["step"])),
        Cell("Best of any epoch", percent("best_of_any_epoch"), "%",
             "with --peek: how published results are selected, and which no one knows beforehand"),
    ]).table  # fmt: skip


FOLDS = Folds()
