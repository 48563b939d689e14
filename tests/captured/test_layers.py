"""Compiled solves inside models, and what differentiating PyTorch's own loop would give."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._higher_order_ops import while_loop

import torchimplicit as ti
from torchimplicit.captured import compilations

DIM = 6


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(DIM, DIM, dtype=torch.float64)
        with torch.no_grad():
            self.inner.weight.mul_(0.5)

    def forward(self, z, x):
        return torch.tanh(self.inner(z) + x)


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.before = nn.Linear(3, DIM, dtype=torch.float64)
        self.layer = ti.nn.Equilibrium(Cell(), solver=ti.Anderson(memory=2, rtol=1e-11), **options)
        self.after = nn.Linear(DIM, 2, dtype=torch.float64)

    def forward(self, x):
        return self.after(self.layer(torch.relu(self.before(x))))


def trained(around=lambda model: model, steps=30, **options):
    """The losses of a few steps, with a smaller last batch of every five."""
    torch.manual_seed(0)
    model = Model(**options)
    called = around(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, frames = [], []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4 if step % 5 == 4 else 8, 3, generator=generator, dtype=torch.float64)
        loss = called(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        frames.append(torch._dynamo.utils.counters["frames"]["total"])
    return torch.tensor(losses), frames


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("compile", [False, True])
def test_a_model_that_is_compiled_around_the_layer_is_right_and_compiles_no_more(compile):
    expected, _ = trained()
    before = compilations()
    found, frames = trained(lambda model: torch.compile(model, backend="aot_eager"), compile=compile)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)
    assert frames[-1] == frames[12]
    assert compilations() == before + compile


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "options",
    [
        {"warm_start": True},
        {"gradient": ti.OneStep()},
        {"gradient": ti.UnrolledPhantom(steps=3)},
        {"gradient": ti.NeumannPhantom(steps=3)},
    ],
    ids=["warm start", "one step", "unrolled phantom", "Neumann phantom"],
)
def test_warm_starts_and_estimators_take_part(options):
    if options.get("warm_start"):

        def losses(compile):
            torch.manual_seed(0)
            model, x = Model(compile=compile, **options), torch.ones(4, 3, dtype=torch.float64)
            values = []
            for _ in range(3):
                loss = model(x).square().mean()
                model.zero_grad()
                loss.backward()
                values += [loss.item(), model.layer.cell.inner.weight.grad.norm().item()]
            return values, model.layer.solution.steps.max().item()

        (one, steps), (two, others) = losses(False), losses(True)
        assert steps == others == 0
        assert two == pytest.approx(one, rel=1e-8)
        return
    before = compilations()
    torch.testing.assert_close(
        trained(steps=6, compile=True, **options)[0], trained(steps=6, **options)[0], rtol=1e-8, atol=0
    )
    assert compilations() == before + 1


def test_the_loop_of_pytorch_differentiates_its_last_step_alone():
    # the start does not require grad: what autograd gives is one step's derivative, and nothing says so. Should this
    # fail one day, PyTorch has mended it, and the row in the documentation goes
    generator = torch.Generator().manual_seed(0)
    w = 0.15 * torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)
    x = torch.randn(3, DIM, generator=generator, dtype=torch.float64)

    def looped(w):
        z, k = torch.zeros_like(x), torch.zeros((), dtype=torch.int64)
        return while_loop(lambda z, k: k < 60, lambda z, k: (torch.tanh(z @ w.T + x), k + 1), (z, k))[0]

    def unrolled(w):
        z = torch.zeros_like(x)
        for _ in range(60):
            z = torch.tanh(z @ w.T + x)
        return z

    torch.compiler.reset()
    found, exact, once = (w.clone().requires_grad_() for _ in range(3))
    value = torch.compile(looped, fullgraph=True, backend="aot_eager")(found)
    value.sum().backward()
    unrolled(exact).sum().backward()
    torch.tanh(value.detach() @ once.T + x).sum().backward()
    torch.testing.assert_close(found.grad, once.grad)
    assert (found.grad - exact.grad).norm() > 0.05 * exact.grad.norm()
    solved = w.clone().requires_grad_()
    problem = ti.FixedPoint(lambda z: torch.tanh(z @ solved.T + x))
    ti.solve(problem, torch.zeros_like(x), solver=ti.Anderson(rtol=1e-12)).value.sum().backward()
    torch.testing.assert_close(solved.grad, exact.grad)
