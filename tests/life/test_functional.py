"""A model that holds the layer, under torch.func."""

import pytest
import torch
from cells import TanhCell, assert_all_close, loss_of, unrolled
from torch import nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap

from torchimplicit.nn import Equilibrium, VariationalDropout, weight_norm


class Model(nn.Module):
    def __init__(self, rowwise=False):
        super().__init__()
        self.stem = nn.Linear(5, 5)
        self.layer = Equilibrium(TanhCell(), rowwise=rowwise)

    def forward(self, x):
        return self.layer(self.stem(x))


@pytest.fixture
def x():
    return torch.randn(3, 5, dtype=torch.float64)


def loss(model, params, x):
    return loss_of(functional_call(model, params, (x,)))


@pytest.mark.parametrize("rowwise", [False, True])
def test_grad(x, rowwise):
    model = Model(rowwise).double()
    params = dict(model.named_parameters())
    got = grad(lambda p: loss(model, p, x))(params)
    expected = torch.autograd.grad(loss_of(unrolled(model.layer.cell, model.stem(x))), params.values())
    assert_all_close(got.values(), expected)
    assert model.layer.solution is None


def test_gradients_per_sample(x):
    model = Model().double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    got = vmap(grad(lambda p, row: loss(model, p, row[None])), in_dims=(None, 0))(params, x)
    for i in range(len(x)):
        model.zero_grad()
        loss_of(model(x[i : i + 1])).backward()
        assert_all_close([g[i] for g in got.values()], [p.grad for p in model.parameters()])


def test_an_ensemble(x):
    models = [Model().double() for _ in range(3)]
    params, buffers = stack_module_state(models)
    base = Model().double().to("meta")

    def call(params, buffers, x):
        return functional_call(base, (params, buffers), (x,))

    torch.testing.assert_close(
        vmap(call, in_dims=(0, 0, None))(params, buffers, x), torch.stack([m(x) for m in models])
    )

    def ensemble_loss(params, x):
        return loss_of(call(params, buffers, x))

    got = vmap(grad(ensemble_loss), in_dims=(0, None))({k: v.detach() for k, v in params.items()}, x)
    for i, model in enumerate(models):
        expected = torch.autograd.grad(loss_of(model(x)), model.parameters())
        assert_all_close([g[i] for g in got.values()], expected)


def test_an_ensemble_trains_by_backward(x):
    models = [Model().double() for _ in range(2)]
    params, buffers = stack_module_state(models)
    base = Model().double().to("meta")
    z = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(params, buffers)
    loss_of(z).backward()
    for i, model in enumerate(models):
        expected = torch.autograd.grad(loss_of(model(x)), model.parameters())
        assert_all_close([params[name].grad[i] for name, _ in model.named_parameters()], expected)


def test_jacobian_in_the_input(x):
    model = Model().double()
    got = jacrev(lambda row: model(row[None])[0])(x[0])
    reference = torch.autograd.functional.jacobian(lambda row: unrolled(model.layer.cell, model.stem(row[None])), x[0])
    torch.testing.assert_close(got, reference[0])


def test_grad_through_weight_norm(x):
    model = Model().double()
    weight_norm(model.layer.cell.recurrent)
    params = dict(model.named_parameters())
    got = grad(lambda p: loss(model, p, x))(params)
    expected = torch.autograd.grad(loss_of(unrolled(model.layer.cell, model.stem(x))), params.values())
    assert_all_close(got.values(), expected)


def test_vmap_draws_a_mask_for_each_sample_if_told_to():
    class Dropping(TanhCell):
        def __init__(self):
            super().__init__()
            self.dropout = VariationalDropout(0.5)

        def forward(self, z, x):
            return self.dropout(super().forward(z, x))

    layer = Equilibrium(Dropping().double())
    z = vmap(lambda row: layer(row[None])[0], randomness="different")(torch.ones(8, 5).double())
    assert (z == 0).any()
    assert z.eq(0).unique(dim=0).shape[0] > 1


def test_the_warm_start_stays_plain(x):
    layer = Equilibrium(TanhCell().double(), warm_start=True)
    before = layer(x)
    vmap(lambda row: layer(row[None])[0])(x)
    grad(lambda x: layer(x).sum())(x)
    torch.testing.assert_close(layer(x), before)
