import copy
from functools import partial

import pytest
import torch
from cells import TanhCell, assert_all_close, gradients, second_derivatives, unrolled
from torch import nn
from torch._dynamo.utils import counters

import torchimplicit as ti
from torchimplicit.nn import Equilibrium, VariationalDropout, spectral_norm, weight_norm


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """With normalizations, so that its compiled backward pass has buffers of its own to give up."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, z, x):
        inner = torch.relu(self.norm(self.first(z)))
        return 0.3 * torch.tanh(self.norm(x + 0.2 * self.second(inner)) + 0.2 * z)


@pytest.fixture
def x():
    return torch.randn(4, 5, dtype=torch.float64, requires_grad=True)


def compiled_layer(cell, how, **options):
    if how == "cell":
        return Equilibrium(torch.compile(cell, backend="aot_eager"), **options)
    if how == "method":
        cell.compile(backend="aot_eager")
        return Equilibrium(cell, **options)
    return torch.compile(Equilibrium(cell, **options), backend="aot_eager")


@pytest.mark.parametrize("how", ["cell", "method", "model"])
def test_first_and_second_derivatives(x, how):
    cell = TanhCell().double()
    reference = copy.deepcopy(cell)
    layer = compiled_layer(cell, how)
    inputs, wanted = (x, *layer.parameters()), (x, *reference.parameters())
    assert_all_close(gradients(layer(x), inputs), gradients(unrolled(reference, x), wanted))
    expected = second_derivatives(unrolled(reference, x), x, wanted)
    assert_all_close(second_derivatives(layer(x), x, inputs), expected)


ESTIMATORS = [
    (ti.Implicit(), None, False),
    (ti.Implicit(), None, True),
    (ti.Implicit(linear_solver=ti.LSMR()), None, False),
    (ti.Implicit(), ti.NewtonKrylov(), False),
    (ti.UnrolledPhantom(), None, False),
    (ti.SharedInverse(), ti.Broyden(), False),
]


@pytest.mark.parametrize(("gradient", "solver", "rowwise"), ESTIMATORS)
def test_estimators_of_a_block_and_no_compilation_after_the_first_steps(gradient, solver, rowwise):
    block = Block().double()
    plain = Equilibrium(copy.deepcopy(block), gradient=gradient, solver=solver, rowwise=rowwise)
    layer = compiled_layer(block, "cell", gradient=gradient, solver=solver, rowwise=rowwise)
    x = torch.randn(3, 4, 4, 4, dtype=torch.float64) * torch.tensor([0.1, 1, 3])[:, None, None, None]
    x.requires_grad_()
    compiled = []
    for _ in range(3):
        got = gradients(layer(x), (x, *layer.parameters()))
        compiled.append(counters["stats"]["unique_graphs"])
    assert 0 < compiled[0] <= 8
    assert compiled[1] == compiled[2] <= 8
    assert_all_close(got, gradients(plain(x), (x, *plain.parameters())), rtol=1e-4, atol=1e-7)


def test_a_cell_that_was_compiled_and_differentiated_before():
    block = Block()
    compiled = torch.compile(block, backend="aot_eager")
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    compiled(x, x).sum().backward()
    layer = Equilibrium(compiled)
    expected = gradients(Equilibrium(copy.deepcopy(block))(x), (x,))
    assert_all_close(gradients(layer(x), (x,)), expected, rtol=1e-3, atol=1e-4)


def test_retain_graph(x):
    layer = compiled_layer(Block().double(), "cell")
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    loss = layer(x).sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)
    assert_all_close(torch.autograd.grad(loss, x), first, rtol=0, atol=0)


def test_parameter_hooks_fire_once(x):
    cell = TanhCell().double()
    reference = copy.deepcopy(cell)
    layer = compiled_layer(cell, "cell")
    fired = []
    layer.cell.recurrent.weight.register_hook(lambda grad: fired.append(1) or grad)
    got = gradients(layer(x), (x, *layer.parameters()))
    assert fired == [1]
    assert_all_close(got, gradients(unrolled(reference, x), (x, *reference.parameters())))


@pytest.mark.parametrize("how", ["cell", "model"])
@pytest.mark.parametrize(
    "norm",
    [
        weight_norm,
        spectral_norm,
        partial(weight_norm, target=0.8, clip=0.9),
        partial(spectral_norm, scale=True, clip=0.9, paired=True, iterations=1),
    ],
)
def test_normalized_weights(x, norm, how):
    cell = TanhCell().double()
    norm(cell.recurrent)
    if norm is spectral_norm:
        norm(cell.input, iterations=1)
    layer = compiled_layer(cell, how)
    plain = Equilibrium(copy.deepcopy(cell))
    for _ in range(2):  # in training, so that the power method goes on in both
        got = gradients(0.5 * layer(0.5 * x), (x, *layer.parameters()))
        expected = gradients(0.5 * plain(0.5 * x), (x, *plain.parameters()))
        assert_all_close(got, expected, rtol=1e-6, atol=1e-8)
        for a, b in zip(layer.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("how", ["cell", "model"])
def test_dropout_keeps_one_mask_a_solve(x, how):
    class Dropping(TanhCell):
        def __init__(self):
            super().__init__()
            self.dropout = VariationalDropout(0.5)

        def forward(self, z, x):
            return self.dropout(super().forward(z, x))

    cell = Dropping().double()
    plain = Equilibrium(copy.deepcopy(cell))
    layer = compiled_layer(cell, how)
    for seed in range(3):
        torch.manual_seed(seed)
        got = gradients(layer(x), (x, *layer.parameters()))
        torch.manual_seed(seed)
        assert_all_close(got, gradients(plain(x), (x, *plain.parameters())))
    assert counters["stats"]["unique_graphs"] <= 4


def test_autocast(x):
    cell = TanhCell()
    layer = compiled_layer(copy.deepcopy(cell), "cell")
    x = x.detach().float().requires_grad_()
    results = []
    for module in (layer, Equilibrium(cell)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = module(x)
        results.append(gradients(z, (x, *module.parameters())))
    assert_all_close(*results, rtol=0.1, atol=0.1)


def test_a_compiled_function_in_a_plain_solve(x):
    cell = TanhCell().double()
    compiled = torch.compile(cell, backend="aot_eager")
    z = ti.solve(ti.FixedPoint(lambda z, x: compiled(z, x)), torch.zeros_like(x), x).value
    inputs = (x, *cell.parameters())
    assert_all_close(gradients(z, inputs), gradients(unrolled(cell, x), inputs))


def test_copies_of_a_layer_with_a_compiled_cell(x):
    layer = compiled_layer(TanhCell().double(), "method")
    z = layer(x)
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(twin(x), z)


def test_training_a_compiled_model_compiles_a_bounded_number_of_times():
    model = nn.Sequential(nn.Linear(5, 5), Equilibrium(TanhCell()), nn.Linear(5, 1))
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    data = torch.randn(8, 5)
    counts = []
    for module in (compiled, twin):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            (module(data) ** 2).mean().backward()
            optimizer.step()
            counts.append(counters["stats"]["unique_graphs"])
    assert counts[1] == counts[4]
    assert_all_close(model.parameters(), twin.parameters(), rtol=1e-3, atol=1e-4)


def test_inductor(x):
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(0.5))

        def forward(self, z, x):
            return torch.tanh(self.gain * z + x).sin()

    layer = Equilibrium(torch.compile(Gain().double()))
    inputs = (x, layer.cell.gain)
    expected = gradients(unrolled(layer.cell._orig_mod, x), inputs)
    assert_all_close(gradients(layer(x), inputs), expected)
    expected = second_derivatives(unrolled(layer.cell._orig_mod, x), x, inputs)
    assert_all_close(second_derivatives(layer(x), x, inputs), expected)
