from __future__ import annotations

from typing import Any

import pytest
import torch

import torchimplicit as ti
from torchimplicit import Anderson, FixedPoint, FixedPointIteration
from torchimplicit._solve import flat_system
from torchimplicit.solvers import Solver, iterate
from torchimplicit.testing.solver_suite import SolverSuite


class TestAnderson(SolverSuite):
    def make(self, **options: Any) -> Solver:
        return Anderson(**options)


class TestDampedAnderson(SolverSuite):
    def make(self, **options: Any) -> Solver:
        return Anderson(**{"memory": 3, "damping": 0.7, "regularization": 1e-9, **options})


def matrices(dim: int, seed: int) -> dict[str, torch.Tensor]:
    """Matrices of norm 0.9."""
    g = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    upper = torch.triu(g, 1)
    raw = {
        "gaussian": g,
        "symmetric": g + g.T,
        "definite": g @ g.T,
        "negative": -g @ g.T,
        "orthogonal": torch.linalg.qr(g).Q,
        "nonnormal": 0.9 * upper / torch.linalg.matrix_norm(upper, 2) + 0.1 * torch.diag(g.diagonal().abs()),
    }
    return {name: 0.9 * w / torch.linalg.matrix_norm(w, 2) for name, w in raw.items()}


MAPS = {
    "linear": lambda z, w, x: z @ w.T + x,
    "tanh": lambda z, w, x: torch.tanh(z @ w.T + x),
    "relu": lambda z, w, x: torch.relu(z @ w.T + x),
    "sine": lambda z, w, x: torch.sin(z @ w.T + x),
}


@pytest.mark.filterwarnings("ignore::torchimplicit.ConvergenceWarning")  # of plain iteration, where it is slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("f", MAPS.values(), ids=MAPS)
def test_is_never_slower_than_plain_iteration_on_contractions(f, dtype):
    for seed in (0, 1):
        for name, w in matrices(24, seed).items():
            for amplitude in (0.01, 10.0):
                x = amplitude * torch.randn(6, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
                args = (torch.zeros(6, 24, dtype=dtype), w.to(dtype), x.to(dtype))
                for rtol in (1e-4, 1e-6):
                    solvers = (FixedPointIteration(rtol=rtol, max_steps=600), Anderson(rtol=rtol, max_steps=600))
                    plain, fast = (ti.solve(FixedPoint(f), *args, solver=solver) for solver in solvers)
                    assert fast.converged.all(), (name, seed, amplitude, rtol, fast.summary())
                    assert fast.evaluations <= plain.evaluations, (name, seed, amplitude, rtol)


def test_small_states_are_no_slower():
    # a regularization that is absolute (TorchDEQ's 1e-4) stalls here
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(128, 128, generator=generator)
    w = 0.9 * (g + g.T) / torch.linalg.matrix_norm(g + g.T, 2)
    x = 0.01 * torch.randn(16, 128, generator=generator)
    solution = ti.solve(
        FixedPoint(lambda z, x: torch.tanh(z @ w.T + x)), torch.zeros(16, 128), x, solver=Anderson(rtol=1e-6)
    )
    assert solution.converged.all()
    assert solution.evaluations <= 45


def test_solves_an_expansion():
    w = torch.diag(torch.tensor([-3.0, 2.0, 0.5, -1.5], dtype=torch.float64))
    x = torch.ones(2, 4, dtype=torch.float64)
    solution = ti.solve(FixedPoint(lambda z, x: z @ w + x), torch.zeros_like(x), x)
    torch.testing.assert_close(solution.value, x / (1 - w.diagonal()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_small_system_of_half_precision_is_in_float32(dtype):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    system, z, params = flat_system(FixedPoint(lambda z, x: 0.5 * torch.tanh(z) + x), torch.zeros_like(x), (x,))
    with torch.no_grad():
        outcome = iterate(Anderson(), system, z, params)
    assert outcome.report.converged.all()
    assert outcome.z.dtype == dtype
    assert outcome.state.gram.dtype == outcome.state.turns.ring.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"memory": 0}, ValueError, "memory is 0, and must be at least 1"),
        ({"memory": 2.0}, TypeError, "memory must be an integer"),
        ({"damping": 0.0}, ValueError, r"damping is 0.0, and must lie in \(0, 1\]"),
        ({"damping": 1.5}, ValueError, "damping is 1.5"),
        ({"damping": float("nan")}, ValueError, "damping is nan"),
        ({"regularization": -1e-4}, ValueError, "regularization is -0.0001"),
        ({"growth": 0.5}, ValueError, "growth is 0.5, and must be at least 1"),
    ],
)
def test_refuses(options, error, words):
    with pytest.raises(error, match=rf"Anderson\.{words}"):
        Anderson(**options)
