"""The cost of a training step: time of its passes, evaluations, memory, and the accuracy of its gradient.

Runs of one table see a machine that is more or less busy; kinds of steps that take turns in one process see the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from statistics import fmean, median
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchimplicit.nn import Equilibrium
from torchimplicit.recipes.runtime.run import clock
from torchimplicit.recipes.runtime.settings import from_plain
from torchimplicit.recipes.runtime.table import Cell, Table, TitledTable, sheet
from torchimplicit.recipes.runtime.task import Costs

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """One training step, or the median of several; NaN for what is not measured.

    Attributes:
        forward_seconds, backward_seconds: of the two passes: CPU seconds of the process; on a GPU, wall seconds.
        forward, backward: evaluations of the cells, and products with their Jacobians.
        seconds: time of both passes, and of the update if there is one.
        residual: residual of the adjoint, relative; of a phantom gradient, that of its truncated series.
        cosine, norm: of the gradient in all parameters against the exact one: cosine, and ratio of
            norms.
        megabytes: memory at its peak in a step, over what was held before it.
        parameters: number of parameters; 0 if not counted.
    """

    forward_seconds: float
    backward_seconds: float
    forward: float
    backward: float
    seconds: float = nan
    residual: float = nan
    cosine: float = nan
    norm: float = nan
    megabytes: float = nan
    parameters: int = 0

    def __post_init__(self) -> None:
        if isnan(self.seconds):
            object.__setattr__(self, "seconds", self.forward_seconds + self.backward_seconds)


def one_step(
    task: nn.Module, loss: Callable[[], Tensor], where: torch.device, optimizer: Optimizer | None = None
) -> StepCost:
    """Both passes of a loss, and the update if there is an optimizer; the gradient is left in ``grad``."""
    task.zero_grad()
    watch, now = Costs(equilibria(task)), clock(where)
    times = [now()]
    value = loss()
    times.append(now())
    value.backward()
    times.append(now())
    if optimizer is not None:
        optimizer.step()
    seconds, figures = now() - times[0], watch.figures()
    watch.close()
    return StepCost(
        forward_seconds=times[1] - times[0],
        backward_seconds=times[2] - times[1],
        seconds=seconds if optimizer is not None else nan,
        forward=figures["forward_evaluations"],
        backward=figures["backward_evaluations"],
    )


def in_turn(kinds: Mapping[K, Callable[[], StepCost]], repeats: int, steps: int = 1) -> dict[K, StepCost]:
    """Median step costs of every kind: ``steps`` of one, then of the next, repeated this many times after one uncounted
    warm-up round."""
    measured: dict[K, list[StepCost]] = {name: [] for name in kinds}
    for turn in range(repeats + 1):
        for name, step in kinds.items():
            costs = [step() for _ in range(steps)]
            measured[name] += costs if turn else []
    return {name: middle(costs) for name, costs in measured.items()}


def timed_in_turn(
    cases: Mapping[K, Callable[[], V]], repeats: int, where: torch.device, warm: bool = False
) -> dict[K, tuple[float, V]]:
    """Median seconds of every case and its last result, taking turns; with ``warm`` after one uncounted round."""
    now = clock(where)
    seconds: dict[K, list[float]] = {name: [] for name in cases}
    results: dict[K, V] = {}
    for turn in range(repeats + warm):
        for name, case in cases.items():
            began = now()
            results[name] = case()
            if turn or not warm:
                seconds[name].append(now() - began)
    return {name: (median(seconds[name]), results[name]) for name in cases}


def middle(costs: Sequence[StepCost]) -> StepCost:
    """Medians, but means of evaluations."""

    def of(name: str, over: Callable[[Any], float] = median) -> float:
        return over([getattr(cost, name) for cost in costs])

    medians: Any = {
        name: of(name) for name in ("forward_seconds", "backward_seconds", "seconds", "residual", "cosine", "norm")
    }
    return StepCost(**medians, forward=of("forward", fmean), backward=of("backward", fmean))


def equilibria(task: nn.Module) -> list[Equilibrium]:
    """The layers of a model."""
    return [layer for layer in task.modules() if isinstance(layer, Equilibrium)]


def flat_gradient(task: nn.Module) -> Tensor:
    """The gradient in all weights that have one, flattened."""
    return torch.cat([p.grad.flatten() for p in task.parameters() if p.grad is not None]).double()


def beside(gradient: Tensor, exact: Tensor) -> dict[str, Any]:
    """``cosine`` and ``norm`` of a gradient against another."""
    return {
        "cosine": float(torch.cosine_similarity(gradient, exact, dim=0)),
        "norm": float(gradient.norm() / exact.norm()),
    }


def peak_bytes(step: Callable[[], object], where: torch.device) -> int:
    """Peak memory while ``step`` runs, above what was held before it."""
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
        before = torch.cuda.memory_allocated(where)
        step()
        return torch.cuda.max_memory_allocated(where) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step()
    assert watched.profiler is not None
    held, most = 0, 0
    events: list[Any] = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def costs_of(plain: Mapping[str, Any]) -> dict[str, StepCost]:
    """Step costs from plain data of a run or record."""
    return {name: from_plain(StepCost, one) for name, one in plain.items()}


TIME = "CPU time (wall time on a GPU)"
"""How notes name the seconds of a :class:`StepCost`."""


def step_table(costs: Mapping[str, StepCost], labels: Mapping[str, str] | None = None, update: bool = True) -> Table:
    """Tabulate the step costs of the labelled kinds; ``update`` if they include the optimizer's."""
    names = labels or {name: name for name in costs}
    passes = "the forward pass, the backward pass and the update" if update else "the forward and the backward pass"
    return sheet("", [name for name in names if name in costs], [
        Cell("Model", lambda name: names[name]),
        Cell("Step", lambda name: f"{1e3 * costs[name].seconds:.2f}", "ms",
             f"{TIME} of {passes}, median over the steps; the rows take turns."),
        Cell("Forward", lambda name: f"{1e3 * costs[name].forward_seconds:.2f}", "ms",
             f"{TIME} of the forward pass, median over the steps."),
        Cell("Backward", lambda name: f"{1e3 * costs[name].backward_seconds:.2f}", "ms",
             f"{TIME} of the backward pass, median over the steps."),
        Cell("Evaluations", lambda name: f"{costs[name].forward:.1f}", "",
             "Evaluations of the cell in the forward pass, in whole-batch equivalents; mean over the steps."),
        Cell("Products", lambda name: f"{costs[name].backward:.1f}", "",
             "Products with the cell's Jacobian in the backward pass, in whole-batch equivalents; mean over the "
             "steps."),
        Cell("Peak memory", lambda name: f"{costs[name].megabytes:.1f}", "MB",
             "Largest memory in use during a step, less what was in use before it."),
    ]).table  # fmt: skip


def step_sheet(costs: Mapping[str, Any], labels: Mapping[str, str]) -> list[TitledTable]:
    """Tabulate step costs from a record; empty if not measured."""
    table = step_table(costs_of(costs), labels)
    return [TitledTable("A training step", table)] if table.rows else []
