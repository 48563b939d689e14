"""The tables of docs/choosing/together.md say what goes together: each cell is tried."""

from pathlib import Path

import pytest
import torch

import torchimplicit as ti

PAGE = Path(__file__).parents[1] / "docs" / "choosing" / "together.md"
D = torch.float64


def fixed_point(a):
    return ti.FixedPoint(lambda z, a: 0.5 * torch.tanh(z) + a), torch.zeros_like(a)


def root(a):
    return ti.Root(lambda z, a: z + 0.2 * torch.sin(z) - a), torch.zeros_like(a)


def minimum(a, **options):
    return ti.Minimum(lambda z, a: ((z - a) ** 2 + 0.1 * z**4).sum(1), **options), torch.full_like(a, 0.5)


def plane(a):
    return minimum(a, constraint=ti.LinearEquality(torch.ones(a.shape[1], dtype=D), 0.5 * a.shape[1]))


def on_a_set(a):
    return minimum(a, constraint=ti.Box(0.0, 1.0))


def least_squares(a):
    return ti.LeastSquares(lambda z, a: torch.cat((z - a, 0.3 * z.sin()), dim=1)), torch.zeros_like(a)


def joint(a):
    problem = ti.JointInference(
        lambda z, x, a: 0.5 * torch.tanh(z) + x + a, lambda z, x, a: (z - 0.3).square().sum(1), step_size=0.05
    )
    return problem, (torch.zeros_like(a), torch.zeros_like(a))


PROBLEMS = {
    "`FixedPoint`": fixed_point,
    "`Root`": root,
    "`Minimum`": minimum,
    "one `LinearEquality`": plane,
    "on a set": on_a_set,
    "`LeastSquares`": least_squares,
    "`JointInference`": joint,
}
MADE = {
    "FixedPointIteration": lambda: ti.FixedPointIteration(max_steps=5000),
    "Chandrupatla": lambda: ti.Chandrupatla(low=-3.0, high=3.0),
    "GradientDescent": lambda: ti.GradientDescent(step_size=0.2),
    "EquilibriumPropagation": lambda: ti.EquilibriumPropagation(nudge=None),
    "WhenUnconverged": lambda: ti.WhenUnconverged(gradient=ti.Implicit(), instead=0.0),
}


def strategy(name):
    return MADE[name]() if name in MADE else getattr(ti, name)()


def tables():
    """The cells of the page: ``(row, column, whether it says yes)`` for solvers, then for gradients."""
    for kind, part in zip(("solver", "gradient"), PAGE.read_text(encoding="utf-8").split("\n## ")[1:3], strict=True):
        header, _, *rows = [line for line in part.splitlines() if line.startswith("|")]
        columns = [cell.strip() for cell in header.strip("|").split("|")][1:]
        for row in rows:
            name, *cells = (cell.strip() for cell in row.strip("|").split("|"))
            for column, cell in zip(columns, cells, strict=True):
                yield kind, name.strip("`"), column, cell


CELLS = list(tables())


@pytest.mark.parametrize(("kind", "name", "column", "cell"), CELLS, ids=lambda cell: str(cell))
def test_a_cell(kind, name, column, cell):
    a = torch.tensor(
        [[0.4], [0.7]] if name == "Chandrupatla" else [[0.4, 0.2], [0.7, 0.1]], dtype=D, requires_grad=True
    )
    problem, start = PROBLEMS[column](a)
    options = {kind: strategy(name)}
    if name == "SharedInverse":
        options["solver"] = ti.Broyden()
    if name == "Reversible":
        options["solver"] = ti.ReversibleIteration()
    if name == "Unrolled":  # no default will do: it cannot go through the linear solves of Newton's method
        descends = column in ("`Minimum`", "one `LinearEquality`", "`LeastSquares`")
        options["solver"] = strategy("GradientDescent") if descends else ti.Anderson()
    if name == "FixedPointIteration" and isinstance(problem, ti.Minimum | ti.LeastSquares):
        options[kind] = ti.FixedPointIteration(damping=0.2)  # the length of its steps down the slope
    if cell == "–":
        with pytest.raises((ValueError, ti.UnsupportedDerivativeError)):
            differentiated(problem, start, a, options)
        return
    assert cell == "yes"
    solution = differentiated(problem, start, a, options)
    assert a.grad.isfinite().all()
    if kind == "solver":
        assert solution.converged.all(), solution.summary()


def differentiated(problem, start, a, options):
    solution = ti.solve(problem, start, a, **options)
    value = solution.value[0] if isinstance(problem, ti.JointInference) else solution.value
    value.square().sum().backward()
    return solution
