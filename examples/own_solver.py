"""Your own solver, tested by the suite that comes with the library.

The step is that of Barzilai and Borwein (1988) for the residual `f(z) - z`: its length follows from the
change in the last step, sample by sample. The library provides the loop (tolerances, finished samples, the
best iterate, NaN in one row) and every gradient. Run it as it is, or with pytest for the suite alone.
"""

import sys
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import pytest
import torch

import torchimplicit as ti
from torchimplicit.problems import Point
from torchimplicit.solvers import Evaluator, Move, Progress, Solver
from torchimplicit.testing import SolverSuite


class Last(NamedTuple):
    """State and residual before the last step, `[batch, dim]`."""

    z: torch.Tensor
    residual: torch.Tensor


@final
@dataclass(frozen=True, kw_only=True)
class BarzilaiBorwein(Solver):
    """Steps of length `|dz|² / |dz · dr|` along the residual r.

    Args:
        longest: the longest step, in units of the residual.
    """

    longest: float = 10.0
    max_steps: int = 200

    def start(self, point: Point) -> Last:
        return Last(point.z, torch.zeros_like(point.z))

    def step(self, evaluate: Evaluator, point: Point, state: Last, progress: Progress) -> Move:
        moved, changed = point.z - state.z, point.residual - state.residual
        slope = -(moved * changed).sum(-1, keepdim=True)
        length = moved.square().sum(-1, keepdim=True) / torch.where(slope > 0, slope, torch.inf)
        length = torch.where(length > 0, length.clamp(max=self.longest), 1.0)
        return Move(point.z + length * point.residual, Last(point.z, point.residual))


class TestBarzilaiBorwein(SolverSuite):
    """Some forty tests: tolerances, statuses, batches, dtypes, trees, NaN, gradients."""

    kind = "map"

    def make(self, **options: Any) -> Solver:
        return BarzilaiBorwein(**options)


def main() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64, dtype=torch.float64)
    weight = 0.5 * (weight + weight.T)
    x = torch.randn(32, 64, dtype=torch.float64, requires_grad=True)
    traces = {}
    for norm in (0.5, 0.9, 0.99):
        scaled = norm * weight / torch.linalg.matrix_norm(weight, 2)
        problem = ti.FixedPoint(lambda z, x, scaled=scaled: torch.tanh(z @ scaled + x))
        solvers: tuple[Solver, ...] = (ti.FixedPointIteration, BarzilaiBorwein, ti.Anderson)
        print(f"norm of the weights {norm}")
        for kind in solvers:
            solver = kind(rtol=1e-9, max_steps=1000, keep_trace=True)
            solution = ti.solve(problem, torch.zeros_like(x), x, solver=solver)
            (gradient,) = torch.autograd.grad(solution.value.sum(), x)
            print(f"  {kind.__name__:20s} {solution.evaluations:6.1f} evaluations, gradient {gradient.norm():.6f}")
            traces[norm, kind.__name__] = solution.trace

    if len(sys.argv) > 1:  # the picture
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(1, 3, figsize=(10, 3), sharey=True, layout="constrained")
        for axis, norm in zip(axes, (0.5, 0.9, 0.99), strict=True):
            for (size, name), trace in traces.items():
                if size == norm:
                    axis.semilogy(trace.relative.amax(1), label=name)
            axis.set(title=f"norm of the weights {norm}", xlabel="step", ylim=(1e-10, 2))
        axes[0].set(ylabel="largest relative residual")
        axes[0].legend(fontsize="small")
        figure.savefig(sys.argv[1], dpi=120)


if __name__ == "__main__":
    main()
    if "__file__" in globals():  # a notebook is no file that pytest could run
        print("the suite:")
        sys.exit(pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", __file__]))
