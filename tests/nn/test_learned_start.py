"""Predicted starts, and maps that are trained to come to an equilibrium in few steps."""

import copy
import pickle

import pytest
import torch
from cells import TanhCell
from torch import nn

import torchimplicit as ti
from torchimplicit.nn import Equilibrium, LearnedStart
from torchimplicit.regularizers import consistency

DIM = 5


def inputs(batch=4):
    return torch.randn(batch, DIM, dtype=torch.float64, requires_grad=True)


def layer_with_start(**options):
    torch.manual_seed(0)
    start = LearnedStart(nn.Linear(DIM, DIM).double())
    return Equilibrium(TanhCell().double(), start=start, solver=ti.FixedPointIteration(rtol=1e-12), **options)


def test_the_solve_begins_at_the_prediction_and_ends_at_the_same_equilibrium_with_the_same_gradient():
    layer, x = layer_with_start(), inputs()
    cold = Equilibrium(layer.cell, solver=layer.solver)
    layer(x).sin().sum().backward()
    ours = [x.grad, *(p.grad for p in layer.cell.parameters())]
    y = x.detach().requires_grad_()
    layer.cell.zero_grad()
    cold(y).sin().sum().backward()
    theirs = [y.grad, *(p.grad for p in layer.cell.parameters())]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert all(p.grad is None for p in layer.start.parameters()), "the equilibrium does not depend on its start"


def test_the_loss_is_the_relative_distance_and_moves_the_network_alone():
    layer, x = layer_with_start(), inputs()
    z = layer(x)
    loss = layer.start.loss(layer.solution)
    there = z.detach()
    expected = ((layer.start.network(x) - there).norm(dim=1) / there.norm(dim=1)).square().mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None for p in layer.start.parameters())
    assert x.grad is None
    assert all(p.grad is None for p in layer.cell.parameters())


def test_a_trained_start_saves_steps():
    layer = layer_with_start()
    optimizer = torch.optim.Adam(layer.start.parameters(), lr=0.02)
    x = inputs(64).detach()

    def steps():
        with torch.no_grad():
            layer.solve(x, solver=ti.FixedPointIteration(rtol=1e-2))
        return float(layer.solution.steps.double().mean())

    before = steps()
    for _ in range(200):
        optimizer.zero_grad()
        layer(x)
        layer.start.loss(layer.solution).backward()
        optimizer.step()
    assert steps() < 0.7 * before


def test_a_start_given_by_name_and_a_warm_start_come_first():
    layer, x = layer_with_start(warm_start=True), inputs()
    layer(x)
    layer(x)
    assert layer.solution.steps.max() <= 1
    other = layer_with_start()
    z = other(x)
    other(x, z0=z.detach())
    assert other.solution.steps.max() <= 1


def test_it_predicts_every_leaf_of_a_state():
    class Network(nn.Module):
        def forward(self, x):
            return {"a": 0 * x, "b": x[:, :2]}

    class Cell(nn.Module):
        def forward(self, z, x):
            return {"a": torch.tanh(z["a"] / 2 + x), "b": torch.tanh(z["a"][:, :2] / 2)}

    layer, x = Equilibrium(Cell(), start=LearnedStart(Network())), inputs()
    z = layer(x)
    squares = sum(z[k].detach().square().sum(dim=1) for k in z)
    apart = z["a"].detach().square().sum(dim=1) + (z["b"].detach() - x[:, :2]).square().sum(dim=1)
    torch.testing.assert_close(layer.start.loss(layer.solution), (apart / squares).mean())


def test_a_loss_without_a_prediction_is_refused():
    layer, x = layer_with_start(), inputs()
    with torch.no_grad():
        layer(x)
    with pytest.raises(ValueError, match=r"call the layer first, outside torch\.no_grad"):
        layer.start.loss(layer.solution)
    layer(x)
    layer.start.loss(layer.solution)
    with pytest.raises(ValueError, match="since the last loss"):
        layer.start.loss(layer.solution)
    layer(x)
    other = layer_with_start()
    other(inputs(3))
    with pytest.raises(ValueError, match="another batch"):
        layer.start.loss(other.solution)


def test_samples_that_are_not_finite_teach_nothing():
    layer, x = layer_with_start(throw=False), inputs().detach()
    x[1] = torch.nan
    layer(x)
    loss = layer.start.loss(layer.solution)
    loss.backward()
    assert loss.isfinite()
    layer(x[[0, 2, 3]])
    torch.testing.assert_close(layer.start.loss(layer.solution), loss)


def test_it_is_saved_copied_and_of_the_right_kind():
    layer, x = layer_with_start(), inputs()
    layer(x)
    assert {"start.network.weight", "start.network.bias"} <= layer.state_dict().keys()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(x), layer(x))
    with pytest.raises(TypeError, match=r"LearnedStart takes an nn\.Module"):
        LearnedStart(lambda x: x)
    with pytest.raises(TypeError, match="start must be a Module"):
        Equilibrium(TanhCell(), start=lambda x: x)


class TestConsistency:
    def test_it_is_the_mean_over_states_of_what_steps_leave(self):
        cell, x = TanhCell().double(), inputs()
        solution = ti.solve(
            ti.FixedPoint(cell), torch.zeros_like(x), x, solver=ti.FixedPointIteration(keep_trajectory=True)
        )
        there = solution.value.detach()
        states = [solution.trajectory[0], there]
        expected = torch.stack(
            [((cell(cell(z, x), x) - there).norm(dim=1) / there.norm(dim=1)).square().mean() for z in states]
        ).mean()
        found = consistency(ti.FixedPoint(cell), solution, x, count=2, steps=2)
        torch.testing.assert_close(found, expected)
        grads = torch.autograd.grad(found, list(cell.parameters()))
        for a, b in zip(grads, torch.autograd.grad(expected, list(cell.parameters())), strict=True):
            torch.testing.assert_close(a, b)

    def test_a_student_does_in_one_step_what_many_have_done(self):
        torch.manual_seed(0)
        cell, x = TanhCell().double(), inputs(64).detach()
        teacher = Equilibrium(cell, solver=ti.FixedPointIteration(rtol=1e-10, keep_trajectory=True))
        solution = teacher.solve(x)
        student = copy.deepcopy(cell)
        fast = Equilibrium(student, solver=ti.FixedPointIteration(steps=1))
        optimizer = torch.optim.Adam(student.parameters(), lr=0.01)

        def apart():
            with torch.no_grad():
                return float((fast(x) - solution.value).norm() / solution.value.norm())

        before = apart()
        for _ in range(200):
            optimizer.zero_grad()
            consistency(ti.FixedPoint(student), solution, x).backward()
            optimizer.step()
        assert apart() < before / 3

    def test_what_it_cannot_do_is_refused(self):
        cell, x = TanhCell().double(), inputs()
        solution = ti.solve(ti.FixedPoint(cell), torch.zeros_like(x), x)
        with pytest.raises(ValueError, match="keep_trajectory=True"):
            consistency(ti.FixedPoint(cell), solution, x)
        with pytest.raises(TypeError, match="needs a map"):
            consistency(ti.Root(cell), solution, x)
        with pytest.raises(ValueError, match="steps"):
            consistency(ti.FixedPoint(cell), solution, x, steps=0)
