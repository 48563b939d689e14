"""Backward passes as training loops make them."""

import pytest
import torch
from cells import TanhCell, assert_all_close, gradients, loss_of, unrolled
from torch import nn
from torch.utils.checkpoint import checkpoint

import torchimplicit as ti
from torchimplicit.nn import Equilibrium, VariationalDropout


@pytest.fixture
def layer():
    return Equilibrium(TanhCell().double())


@pytest.fixture
def x():
    return torch.randn(4, 5, dtype=torch.float64, requires_grad=True)


def test_a_second_backward_with_retain_graph_gives_the_same(layer, x):
    z, inputs = layer(x), (x, *layer.parameters())
    loss = loss_of(z)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert_all_close(torch.autograd.grad(loss, inputs), first, rtol=0, atol=0)


def test_two_forward_passes_before_one_backward_pass(layer, x):
    inputs = (x, *layer.parameters())
    got = torch.autograd.grad(loss_of(layer(x)) + loss_of(layer(2 * x)), inputs)
    expected = torch.autograd.grad(loss_of(unrolled(layer.cell, x)) + loss_of(unrolled(layer.cell, 2 * x)), inputs)
    assert_all_close(got, expected)


def test_gradients_accumulate_over_parts_of_a_batch(layer, x):
    loss_of(layer(x)).backward()
    whole = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    for part in x.detach().split(2):
        loss_of(layer(part)).backward()
    assert_all_close([p.grad for p in layer.parameters()], whole)


def test_two_layers_that_share_a_cell(layer, x):
    inputs = (x, *layer.parameters())
    z = Equilibrium(layer.cell)(layer(x))
    expected = unrolled(layer.cell, unrolled(layer.cell, x))
    assert_all_close(gradients(z, inputs), gradients(expected, inputs))


def test_a_weight_changed_in_place_before_the_backward_pass_is_an_error(layer, x):
    z = layer(x)
    with torch.no_grad():
        layer.cell.recurrent.weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.parametrize("gradient", [ti.Implicit(), ti.OneStep(), ti.NeumannPhantom()])
def test_parameter_hooks_fire_once(x, gradient):
    layer = Equilibrium(TanhCell().double(), gradient=gradient)
    fired, accumulated = [], []
    for p in layer.parameters():
        p.register_hook(lambda grad: fired.append(1) or 2 * grad)
        p.register_post_accumulate_grad_hook(lambda p: accumulated.append(1))
    loss_of(layer(x)).backward()
    count = len(list(layer.parameters()))
    assert (len(fired), len(accumulated)) == (count, count)
    plain = Equilibrium(TanhCell().double(), gradient=gradient)
    plain.load_state_dict(layer.state_dict())
    expected = torch.autograd.grad(loss_of(plain(x)), plain.parameters())
    assert_all_close([p.grad / 2 for p in layer.parameters()], expected)


def test_hooks_of_the_layer_fire_once(layer, x):
    calls = []
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    layer(x).sum().backward()
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    ("gradient", "warm_start"),
    [(ti.Implicit(), False), (ti.Implicit(), True), (ti.UnrolledPhantom(steps=60), True), (ti.Unrolled(), False)],
)
def test_checkpointing(x, use_reentrant, gradient, warm_start):
    layer = Equilibrium(TanhCell().double(), gradient=gradient, warm_start=warm_start)
    inputs = (x, *layer.parameters())
    expected = gradients(unrolled(layer.cell, x), inputs)
    model = nn.Sequential(nn.Identity(), layer)
    loss_of(checkpoint(model, x, use_reentrant=use_reentrant)).backward()
    assert_all_close([t.grad for t in inputs], expected, rtol=1e-6, atol=1e-8)


def test_checkpointing_gives_second_derivatives(layer, x):
    inputs = (x, *layer.parameters())
    results = []
    for z in (checkpoint(layer, x, use_reentrant=False), unrolled(layer.cell, x)):
        (first,) = torch.autograd.grad(loss_of(z), x, create_graph=True)
        results.append(torch.autograd.grad((first**2).sum(), inputs))
    assert_all_close(*results)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_dropout_mask_again(x, use_reentrant):
    class Dropping(TanhCell):
        def __init__(self):
            super().__init__()
            self.dropout = VariationalDropout(0.5)

        def forward(self, z, x):
            return self.dropout(super().forward(z, x))

    layer = Equilibrium(Dropping().double())
    inputs = (x, *layer.parameters())
    torch.manual_seed(5)
    expected = gradients(layer(x), inputs)
    torch.manual_seed(5)
    loss_of(checkpoint(layer, x, use_reentrant=use_reentrant)).backward()
    assert_all_close([t.grad for t in inputs], expected)


class Outer(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.inner = Equilibrium(TanhCell(), **options)
        self.mix = nn.Linear(5, 5)

    def forward(self, z, x):
        return 0.4 * torch.tanh(self.inner(z + x) + self.mix(x))


def nested_unrolled(outer, x):
    z = torch.zeros_like(x)
    for _ in range(50):
        z = 0.4 * torch.tanh(unrolled(outer.inner.cell, z + x, steps=60) + outer.mix(x))
    return z


class TestNested:
    @pytest.mark.parametrize("rowwise", [False, True])
    def test_first_derivatives_are_those_of_unrolling(self, x, rowwise):
        layer = Equilibrium(Outer(rowwise=rowwise).double(), rowwise=rowwise)
        inputs = (x, *layer.parameters())
        assert_all_close(gradients(layer(x), inputs), gradients(nested_unrolled(layer.cell, x), inputs))

    def test_second_derivatives_are_those_of_unrolling(self, x):
        layer = Equilibrium(Outer().double())
        inputs = (x, *layer.parameters())
        results = []
        for z in (layer(x), nested_unrolled(layer.cell, x)):
            (first,) = torch.autograd.grad(loss_of(z), x, create_graph=True)
            results.append(torch.autograd.grad((first**2).sum(), inputs))
        assert_all_close(*results, rtol=1e-6, atol=1e-8)

    def test_three_deep(self, x):
        class Deep(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = Equilibrium(Outer())

            def forward(self, z, x):
                return 0.4 * self.inner(z + x)

        layer = Equilibrium(Deep().double())
        x = x[:1].detach().requires_grad_()
        assert torch.autograd.gradcheck(layer, x)
        weight = layer.cell.inner.cell.inner.cell.recurrent.weight
        (got,) = torch.autograd.grad(layer(x).sum(), weight)
        step = torch.zeros_like(weight)
        step[0, 0] = 1e-6
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                weight.add_(sign * step)
                values.append(layer(x).sum())
                weight.sub_(sign * step)
        torch.testing.assert_close(got[0, 0], (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=1e-7)


class Lazy(nn.Module):
    """Computes its weight when it first needs it, and keeps it, with the history that autograd then recorded."""

    def __init__(self):
        super().__init__()
        self.raw, self.weight = nn.Parameter(0.1 * torch.randn(5, 5)), None

    def forward(self, z, x):
        if self.weight is None:
            self.weight = torch.sin(self.raw)
        return torch.tanh(z @ self.weight + x)


@pytest.mark.parametrize("as_layer", [True, False])
def test_two_solves_of_a_weight_that_is_kept_between_them(x, as_layer):
    cell = Lazy().double()
    layer = Equilibrium(cell) if as_layer else lambda x: ti.solve(ti.FixedPoint(cell), torch.zeros_like(x), x).value
    inputs = (x, cell.raw)
    got = torch.autograd.grad(loss_of(layer(x)) + loss_of(layer(2 * x)), inputs)
    cell.weight = None
    expected = torch.autograd.grad(loss_of(unrolled(cell, x)) + loss_of(unrolled(cell, 2 * x)), inputs)
    assert_all_close(got, expected)
