"""The backward pass belongs to the map that the forward pass evaluated, whatever has changed since: right, or an error.

Each change is made between the two passes, and the gradient held against the one without the change.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.func import functional_call

import torchimplicit as ti
from tests.truth.case import Case
from tests.truth.data import Data

pytestmark = pytest.mark.usefixtures("one_thread")

GRADIENTS = {
    "implicit": lambda: ti.Implicit(linear_solver=ti.GMRES(rtol=1e-12)),
    "dense": lambda: ti.Implicit(linear_solver=ti.Dense()),
    "one-step": ti.OneStep,
    "neumann-phantom": ti.NeumannPhantom,
    "unrolled-phantom": ti.UnrolledPhantom,
    "adaptive-phantom": ti.AdaptivePhantom,
}
PROBLEMS = {
    "fixed_point": lambda step: ti.FixedPoint(step),
    "root": lambda step: ti.Root(lambda z: step(z) - z),
    "minimum": lambda step: ti.Minimum(lambda z: (0.5 * (z - 0.3 * step(z)).square()).sum(1)),
}


class Cell(nn.Module):
    """A map with all that may change: a buffer, a mode, a constant, an attribute, parameters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        data = Data(Case(number=8, dim=4, inputs=4))
        self.W = nn.Parameter(data.tensors["W"])
        self.b = nn.Parameter(data.tensors["b"])
        self.register_buffer("x", data.tensors["x"].clone())
        self.bn = nn.BatchNorm1d(4, dtype=torch.float64)
        self.bn.running_var.fill_(4.0)
        self.constant = torch.full((4,), 0.7, dtype=torch.float64)
        self.gain = 1.0
        self.table = {"shift": torch.full((4,), 0.1, dtype=torch.float64)}

    def forward(self, z):
        before = z @ self.W.mT + self.b + self.x
        return torch.tanh(self.gain * 0.5 * self.bn(before) * self.constant + self.table["shift"])


def moved_statistics(cell):
    with torch.no_grad():
        cell.bn(torch.randn(7, 4, dtype=torch.float64) * 5)


def stepped(cell):
    with torch.no_grad():
        for p in cell.parameters():
            p.add_(0.3)


CHANGES = {
    "a buffer is refilled": lambda cell: cell.x.copy_(torch.randn_like(cell.x)),
    "a buffer is replaced": lambda cell: setattr(cell, "x", torch.randn_like(cell.x)),
    "a buffer's data is replaced": lambda cell: setattr(cell.x, "data", torch.randn_like(cell.x)),
    "a constant is changed in place": lambda cell: cell.constant.mul_(0.2),
    "a constant is replaced": lambda cell: setattr(cell, "constant", cell.constant * 0.2),
    "a tensor in a dict is replaced": lambda cell: cell.table.update(shift=cell.table["shift"] + 1),
    "a number is replaced": lambda cell: setattr(cell, "gain", 0.1),
    "eval": lambda cell: cell.eval(),
    "train": lambda cell: cell.train(),
    "another pass moves the statistics": moved_statistics,
    "an optimizer's step": stepped,
    "a parameter is replaced": lambda cell: setattr(cell, "W", nn.Parameter(cell.W.detach() * 0.1)),
    "a submodule is replaced": lambda cell: setattr(cell, "bn", nn.Identity()),
    "a parameter is frozen": lambda cell: cell.b.requires_grad_(False),
    "the default dtype": lambda cell: torch.set_default_dtype(torch.float64),
    "a state dict is loaded": lambda cell: cell.load_state_dict({k: v + 1 for k, v in cell.state_dict().items()}),
}


@pytest.fixture(autouse=True)
def default_dtype():
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def solve(kind, cell, gradient):
    z0 = torch.zeros(3, 4, dtype=torch.float64)
    solver = {"fixed_point": ti.Anderson(rtol=1e-12), "root": ti.NewtonKrylov(), "minimum": ti.LBFGS()}[kind]
    return ti.solve(PROBLEMS[kind](cell), z0, solver=solver, gradient=gradient())


def gradients(solution, cell, first):
    return torch.autograd.grad(solution.value.square().sum(), first)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("kind", "name"),
    [("fixed_point", name) for name in GRADIENTS] + [("root", "implicit"), ("minimum", "implicit")],
)
def test_a_change_between_the_passes(kind, name, change, training):
    cell = Cell().train(training)
    first = (cell.W, cell.b)
    want = gradients(solve(kind, cell, GRADIENTS[name]), cell, first)
    cell = Cell().train(training)
    first = (cell.W, cell.b)
    solution = solve(kind, cell, GRADIENTS[name])
    CHANGES[change](cell)
    try:
        got = gradients(solution, cell, first)
    except RuntimeError as error:
        # torch's own in-place error, or one of ours that says what happened
        said = ("modified by an inplace operation", "changed since", "does not require grad")
        if not any(words in str(error) for words in said):
            raise
        return
    if not all(torch.allclose(g, w, rtol=1e-6, atol=1e-10) for g, w in zip(got, want)):
        if "data is replaced" in change:
            pytest.xfail("a change through .data escapes torch's version counters too")
        raise AssertionError("the derivative is that of what the world has become since")


class Layer(nn.Module):
    """A model that states its problem in its forward pass, in one of the ways people write."""

    def __init__(self, how):
        super().__init__()
        self.cell, self.how = Cell().eval(), how

    def step(self, z, shift):
        return self.cell(z) + shift

    def forward(self, shift):
        z0 = torch.zeros(3, 4, dtype=torch.float64)
        args = (shift,)
        if self.how == "lambda":
            f, args = (lambda z: self.step(z, shift)), ()
        elif self.how == "method":
            f = self.step
        elif self.how == "partial":
            f, args = __import__("functools").partial(self.step, shift=shift), ()
        else:
            f = lambda z, shift: self.cell(z) + shift  # noqa: E731
        return ti.solve(ti.FixedPoint(f), z0, *args, solver=ti.Anderson(rtol=1e-12)).value


def unrolled(layer, shift):
    z = torch.zeros(3, 4, dtype=torch.float64)
    for _ in range(200):
        z = layer.step(z, shift)
    return z


HOWS = ("lambda", "method", "partial", "argument")


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", ["backward", "grad", "vmap", "ensemble", "inner-loop"])
@pytest.mark.parametrize("how", HOWS)
def test_functional_call(how, mode, frozen):
    layer = Layer(how).requires_grad_(not frozen)
    shift = 0.1 * torch.ones(3, 4, dtype=torch.float64)
    other = {name: 0.9 * p.detach() + 0.01 for name, p in layer.named_parameters()}

    def loss(params, call):
        return call(params).square().sum()

    def ours(params):
        return functional_call(layer, params, (shift,))

    def theirs(params):
        with _substituted(layer, params):
            return unrolled(layer, shift)

    def derivative(call):
        if mode == "backward":
            leaves = {name: t.clone().requires_grad_() for name, t in other.items()}
            found = torch.autograd.grad(loss(leaves, call), list(leaves.values()), allow_unused=True)
            return [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves.values())]
        if mode == "grad":
            return list(torch.func.grad(loss)(other, call).values())
        stacked = {name: torch.stack((t, 0.8 * t)) for name, t in other.items()}
        if mode == "vmap":
            return [torch.func.vmap(call)(stacked)]
        if mode == "ensemble":
            return list(torch.func.vmap(torch.func.grad(lambda p: loss(p, call)))(stacked).values())

        def adapted(params):  # one step of MAML
            grads = torch.func.grad(loss)(params, call)
            return loss({name: p - 0.1 * grads[name] for name, p in params.items()}, call)

        return list(torch.func.grad(adapted)(other).values())

    want = derivative(theirs)
    for g, w in zip(derivative(ours), want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-9)


@contextlib.contextmanager
def _substituted(module, params):
    with torch.nn.utils.stateless._reparametrize_module(module, params):
        yield
