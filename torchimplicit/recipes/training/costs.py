"""What a step costs: evaluations, by watching the equilibria, and seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from torchimplicit.nn import Equilibrium
from torchimplicit.recipes.machine import clock
from torchimplicit.recipes.training.task import Task
from torchimplicit.solution import Solution, Status


class Costs:
    """Watches every solve of some layers, and those that a task tells of, until it is closed.

    Args:
        layers: watched.
        task: whose other solves count too.
    """

    def __init__(self, layers: Sequence[Equilibrium], task: Task | None = None):
        self._solutions: list[Solution] = []
        self._first = layers[0] if layers else None
        self._calls = self._told = 0
        self._handles = [layer.register_solution_hook(self._see) for layer in layers]
        self._task = task
        if task is not None:
            task.listeners.append(self._hear)

    @property
    def solves(self) -> int:
        """How many calls there were of the first layer: one a batch, where a batch calls the model once. Where there
        were none, how many solves the task told of."""
        return self._calls or self._told

    def _see(self, layer: Equilibrium, solution: Solution) -> None:
        self._calls += layer is self._first
        self._keep(solution)

    def _hear(self, solution: Solution) -> None:
        self._told += 1
        self._keep(solution)

    def _keep(self, solution: Solution) -> None:
        # the record is shared with the solution, and is filled in by the backward pass
        self._solutions.append(solution.figures())

    def figures(self) -> dict[str, float]:
        """Evaluations of the cells in whole-batch equivalents, forward and backward, over all layers; the share of
        samples that are not converged; the largest relative residual, and that of the adjoint where it is known."""
        adjoints = [solution.adjoint for solution in self._solutions]
        status = [solution.status.reshape(-1) for solution in self._solutions]
        residual = [solution.residual.reshape(-1) for solution in self._solutions]
        known = [adjoint.residual for adjoint in adjoints if adjoint is not None and adjoint.residual.isfinite().all()]
        return {
            **({"backward_residual": float(torch.cat(known).max())} if known else {}),
            "forward_evaluations": sum(solution.evaluations for solution in self._solutions),
            "backward_evaluations": sum(adjoint.evaluations for adjoint in adjoints if adjoint is not None),
            "unconverged": float((torch.cat(status) != Status.CONVERGED).double().mean()) if status else 0.0,
            "residual": float(torch.cat(residual).nan_to_num(nan=torch.inf).max()) if residual else 0.0,
        }

    def close(self) -> None:
        """Watch no longer, and let go of what was seen."""
        for handle in self._handles:
            handle.remove()
        if self._task is not None:
            self._task.listeners.remove(self._hear)
            self._task = None
        self._solutions = []


class Stopwatch:
    """Seconds of the parts of a step; the device finishes its work before each reading."""

    def __init__(self) -> None:
        self._began = self._last = 0.0
        self._laps: dict[str, float] = {}

    def start(self, device: torch.device) -> None:
        """A step begins."""
        self._laps = {}
        self._began = self._last = clock(device, wall=True)()

    def skip(self, device: torch.device) -> None:
        """What has passed since the last reading belongs to no part."""
        self._last = clock(device, wall=True)()

    @contextmanager
    def pause(self, device: torch.device) -> Iterator[None]:
        """What passes meanwhile belongs neither to the step nor to its parts."""
        began = clock(device, wall=True)()
        yield
        spent = clock(device, wall=True)() - began
        self._began += spent
        self._last += spent

    def lap(self, name: str, device: torch.device) -> None:
        """A part has ended."""
        now = clock(device, wall=True)()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def stop(self, device: torch.device) -> dict[str, float]:
        """The parts, and ``seconds`` for the whole step."""
        return {"seconds": clock(device, wall=True)() - self._began, **self._laps}
