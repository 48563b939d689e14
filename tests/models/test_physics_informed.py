"""Fields of coordinates: their derivatives, in the coordinates and in the weights; their equilibria."""

from __future__ import annotations

from copy import deepcopy
from itertools import product

import pytest
import torch
from torch import nn

from torchimplicit.linear import Dense
from torchimplicit.models.physics_informed import CellField, EquilibriumField, ModuleField, NetworkField
from torchimplicit.models.physics_informed.field import lines_of
from torchimplicit.models.physics_informed.settling import spanning_tree
from torchimplicit.solvers import NewtonKrylov

PRECISE = NewtonKrylov(linear_solver=Dense(), rtol=1e-15)
BOX = (0.0, -1.0), (1.0, 3.0)


class Tanh(nn.Module):
    """The cell of an :class:`EquilibriumField`, by the general way."""

    def __init__(self, of: EquilibriumField):
        super().__init__()
        self.input, self.inner, self.bias = of.input, of.inner, of.bias

    def forward(self, z, x):
        return torch.tanh(x @ self.input.mT + z @ self.inner.mT + self.bias)


def equilibria():
    """The same field twice."""
    torch.manual_seed(0)
    written = EquilibriumField(*BOX, outputs=2, states=5, gain=0.8, solver=PRECISE).double()
    general = CellField(*BOX, Tanh(written), states=5, outputs=2, solver=PRECISE).double()
    general.head, general.shift = written.head, written.shift
    return written, general


def networks():
    torch.manual_seed(0)
    written = NetworkField(*BOX, outputs=2, width=5, depth=2).double()
    first, second, last = written.layers
    return written, ModuleField(*BOX, nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last))


ORDERS = ((0,), (1,), (0, 0), (0, 1), (1, 1), (0, 0, 0), (0, 1, 1), (0, 0, 1, 1))


@pytest.mark.parametrize("pair", [equilibria, networks])
def test_derivatives_written_out_are_the_general_ones(pair):
    written, general = pair()
    x = torch.rand(6, 2, dtype=torch.float64)
    found, right = written.derivatives(x, ORDERS), general.derivatives(x, ORDERS)
    for order in ((), *ORDERS):
        torch.testing.assert_close(found[order], right[order], rtol=1e-9, atol=1e-10, msg=str(order))
    loss, same = (sum(each[order].square().sum() for order in ((), *ORDERS[:6])) for each in (found, right))
    ours = torch.autograd.grad(loss, [p for _, p in sorted(written.named_parameters())])
    theirs = torch.autograd.grad(same, list(general.parameters()))
    assert sorted(g.abs().sum().item() for g in ours) == pytest.approx(
        sorted(g.abs().sum().item() for g in theirs), rel=1e-8
    )


@pytest.mark.parametrize("pair", [equilibria, networks])
def test_derivatives_by_differences(pair):
    made, x, h = pair()[0], torch.rand(6, 2, dtype=torch.float64), 1e-4
    found = made.derivatives(x, ORDERS)
    steps = h * torch.eye(2, dtype=torch.float64)
    for order in ((0,), (1,), (0, 1), (1, 1), (0, 1, 1)):
        lower = made.derivatives
        up, down = (lower(x + s * steps[order[0]], (order[1:],) if order[1:] else ())[order[1:]] for s in (1, -1))
        torch.testing.assert_close(found[order], (up - down) / (2 * h), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", range(4))
def test_weights_of_each_points_own(which):
    made = (*equilibria(), *networks())[which]
    x = torch.rand(3, 2, dtype=torch.float64)
    orders = ((0,), (1, 1))
    shared = made.derivatives(x, orders)
    own = {name: p.detach().expand(3, *p.shape).clone().requires_grad_() for name, p in made.named_parameters()}
    apart = made.derivatives(x, orders, own)
    rows = torch.autograd.grad(sum(apart[order].sum() for order in apart), list(own.values()))
    for point in range(3):
        grads = torch.autograd.grad(
            sum(shared[order][point].sum() for order in shared), list(made.parameters()), retain_graph=True
        )
        for row, grad in zip(rows, grads, strict=True):
            torch.testing.assert_close(row[point], grad, rtol=1e-8, atol=1e-10)


def test_second_derivatives_in_the_weights():
    written, general = equilibria()
    x = torch.rand(4, 2, dtype=torch.float64)
    found = []
    for made, inner in ((written, written.inner), (general, general.cell.inner)):
        loss = made.derivatives(x, ((1, 1),))[1, 1].square().sum() + made(x).square().sum()
        (slope,) = torch.autograd.grad(loss, inner, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), inner)[0])
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


def test_lines_of_partial_derivatives():
    plan = lines_of(((0,), (0, 0), (0, 1, 1)), 2)
    assert plan.orders == sorted(plan.orders, reverse=True)
    for v, order in product((torch.tensor([0.3, -1.7]), torch.tensor([1.0, 2.0])), plan.parts):
        # of u = (v·x)^3, every derivative along a line d is a falling power times (v·d)^n
        value = sum(f * float(v @ torch.tensor(plan.directions[i]).float()) ** n for f, i, n in plan.parts[order])
        assert value == pytest.approx(float(torch.prod(v[list(order)])), rel=1e-5)


def two_branches(states):
    """A field with ``z = tanh(3z + small)``: two stable equilibria at every point, and zero, the unstable one; it was
    trained at five points, where it was in some of them."""
    torch.manual_seed(0)
    made = EquilibriumField((0.0,), (1.0,), outputs=1, states=1).double()
    with torch.no_grad():
        made.inner.fill_(3.0)
        made.input.fill_(0.01)
        made.bias.fill_(0.0)
    known = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None]
    made._settle.set_extra_state((made.unit(known), torch.tensor(states, dtype=torch.float64)[:, None]))
    made(known).sum().backward()
    return made, known, torch.linspace(0, 1, 33, dtype=torch.float64)[:, None]


def test_the_branch_of_training_is_followed():
    made, _, between = two_branches([0.99] * 5)
    with torch.no_grad():
        made(between)
    assert made.converged.all()
    assert (made.last.value > 0.9).all()
    copy = deepcopy(made)
    copy.load_state_dict(made.state_dict())
    with torch.no_grad():
        copy(between)
    torch.testing.assert_close(copy.last.value, made.last.value)


def test_a_jump_between_branches_is_not_converged():
    made, known, between = two_branches([0.99, 0.99, -0.99, -0.99, -0.99])
    with torch.no_grad():
        made(known)
        assert (~made.converged).sum() == 1
        made(between)
    assert (~made.converged).any()
    assert made.converged[:5].all()
    assert made.converged[-10:].all()


def test_points_are_joined_by_the_shortest_tree():
    points = torch.tensor([[0.0], [3.0], [1.0], [2.1], [7.0]])
    assert spanning_tree(points).tolist() == [2, 3, 0, 2, 1]


def test_the_map_contracts_below_a_bound():
    torch.manual_seed(0)
    made = EquilibriumField((0.0,), (1.0,), outputs=1, states=8, gain=50.0, bound=1.0).double()
    assert float(torch.linalg.matrix_norm(made.coupling().detach())) < 1
    made(torch.rand(30, 1, dtype=torch.float64))
    assert made.converged.all()
    free = EquilibriumField((0.0,), (1.0,), outputs=1, states=8, gain=50.0).double()
    assert float(torch.linalg.matrix_norm(free.coupling().detach(), 2)) == pytest.approx(50)
    with pytest.raises(ValueError, match="bound must be positive"):
        EquilibriumField((0.0,), (1.0,), outputs=1, states=8, bound=0.0)


def test_what_makes_no_sense():
    made = NetworkField((0.0,), (1.0,), outputs=1, width=2, depth=1)
    with pytest.raises(ValueError, match="no derivative: its coordinates must lie from 0 to 0"):
        made.derivatives(torch.zeros(2, 1), ((1,),))
    with pytest.raises(ValueError, match="corners of a box"):
        NetworkField((0.0,), (0.0,), outputs=1, width=2, depth=1)
