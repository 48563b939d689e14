"""Several threads, each with its own layer: the results are those of one thread after the other."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import torchimplicit as ti

pytestmark = pytest.mark.usefixtures("one_thread")

THREADS, STEPS = 4, 8


class Cell(nn.Module):
    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.W = nn.Parameter(0.3 * torch.randn(5, 5, generator=generator, dtype=torch.float64))

    def forward(self, z, x):
        return torch.tanh(z @ self.W.mT + x)


def layer(seed):
    return ti.nn.Equilibrium(Cell(seed), warm_start=seed % 2 == 0)


def closure(seed):
    cell = Cell(seed)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = cell

        def forward(self, x):
            return ti.solve(ti.FixedPoint(lambda z: cell(z, x)), torch.zeros_like(x)).value

    return Model()


def minimum(seed):
    cell = Cell(seed)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = cell

        def forward(self, x):
            def energy(z):
                return (z - 0.5 * cell(z, x)).square().sum(1)

            return ti.solve(ti.Minimum(energy), torch.zeros_like(x)).value

    return Model()


def train(make, seed, out):
    try:
        model = make(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        out[seed] = next(model.parameters()).detach().clone()
    except BaseException as error:
        out[seed] = error


@pytest.mark.parametrize("make", [layer, closure, minimum])
def test_threads_that_train_their_own_layers(make):
    alone, together = {}, {}
    for seed in range(THREADS):
        train(make, seed, alone)
    threads = [threading.Thread(target=train, args=(make, seed, together)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = [error for error in together.values() if isinstance(error, BaseException)]
    wrong = not failed and any(not torch.equal(alone[seed], together[seed]) for seed in range(THREADS))
    assert not failed
    assert not wrong


def test_a_transform_in_one_thread_beside_a_solve_in_another():
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cell = Cell(0)
    weight = cell.W.detach()

    def solved(w):
        return ti.solve(ti.FixedPoint(lambda z: torch.tanh(z @ w.mT + x)), torch.zeros_like(x)).value

    want = torch.func.jacrev(solved)(weight)
    out = {}

    def transform(seed):
        try:
            out[seed] = [torch.func.jacrev(solved)(weight) for _ in range(3)]
        except BaseException as error:
            out[seed] = [error]

    def plain(seed):
        train(layer, seed, out)

    threads = [threading.Thread(target=target, args=(seed,)) for seed, target in enumerate((transform, plain) * 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = [each for found in out.values() for each in (found if isinstance(found, list) else [found])]
    failed = [each for each in failed if isinstance(each, BaseException)]
    assert not failed
    for found in (out[0], out[2]):
        for each in found:
            torch.testing.assert_close(each, want)
