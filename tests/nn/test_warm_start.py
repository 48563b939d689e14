import copy

import pytest
import torch
from cells import TanhCell

import torchimplicit as ti
from torchimplicit.nn import Equilibrium, WarmStart


@pytest.fixture
def layer():
    return Equilibrium(TanhCell(), warm_start=True)


@pytest.fixture
def x():
    return torch.randn(4, 5)


def test_the_same_input_again_takes_one_evaluation_and_no_step(layer, x):
    first = layer(x)
    again = layer(x)
    assert layer.solution.steps.eq(0).all()
    assert layer.solution.evaluations <= 1
    torch.testing.assert_close(again, first)


def test_gradients_are_those_of_a_cold_start(layer, x):
    layer(x)
    x = x.requires_grad_()
    (warm,) = torch.autograd.grad(layer(x).sum(), x)
    layer.warm_start.reset()
    (cold,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(warm, cold, rtol=1e-3, atol=1e-4)


def test_training_and_evaluation_remember_apart(layer, x):
    layer(x)
    layer.eval()
    layer(x)
    assert layer.solution.steps.min() > 0
    layer.train()
    layer(x)
    assert layer.solution.steps.eq(0).all()


def test_reset_forgets(layer, x):
    layer(x)
    layer.warm_start.reset()
    layer(x)
    assert layer.solution.steps.min() > 0


def test_a_batch_of_another_size_begins_cold(layer, x):
    layer(x)
    layer(x[:2])
    assert layer.solution.converged.all()
    assert layer.solution.steps.min() > 0


def test_an_explicit_start_wins(layer, x):
    layer(x)
    layer(x, z0=torch.ones(4, 5))
    assert layer.solution.steps.min() > 0


def test_a_failed_solve_is_not_remembered(x):
    layer = Equilibrium(TanhCell(), warm_start=True, throw=False)
    with pytest.warns(match="NaN"):
        layer(x * torch.nan)
    layer(x)
    assert layer.solution.converged.all()


def test_the_output_may_be_changed_in_place(layer, x):
    with torch.no_grad():
        layer(x).zero_()
        layer(x).zero_()
        layer(x)
    assert layer.solution.steps.eq(0).all()


def test_with_unrolled_it_is_refused():
    with pytest.raises(ValueError, match="Unrolled differentiates the solver's steps"):
        Equilibrium(TanhCell(), warm_start=True, gradient=ti.Unrolled())


def test_nothing_is_saved_or_copied(layer, x):
    layer(x)
    assert not any("warm" in name for name in layer.state_dict())
    other = copy.deepcopy(layer)
    other(x)
    assert other.solution.steps.min() > 0


class TestOfSamples:
    def layer(self):
        return Equilibrium(TanhCell(), warm_start=WarmStart(samples=10), rowwise=True)

    def test_each_sample_is_remembered_through_shuffling(self):
        layer, data = self.layer(), torch.randn(10, 5)
        for rows in torch.arange(10).split(4):
            layer(data[rows], index=rows)
        for rows in torch.randperm(10).split(5):
            layer(data[rows], index=rows)
            assert layer.solution.steps.eq(0).all()

    def test_unseen_samples_begin_cold(self):
        layer, data = self.layer(), torch.randn(10, 5)
        layer(data[:2], index=torch.tensor([0, 1]))
        layer(data[1:3], index=torch.tensor([1, 2]))
        assert layer.solution.steps[0] == 0
        assert layer.solution.steps[1] > 0

    def test_the_index_must_come(self):
        with pytest.raises(ValueError, match="call the layer with index="):
            self.layer()(torch.randn(2, 5))

    @pytest.mark.parametrize("index", [torch.tensor([0]), torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]])])
    def test_the_index_must_fit(self, index):
        with pytest.raises(ValueError, match=r"index must be int64 \[batch\]"):
            self.layer()(torch.randn(2, 5), index=index)

    def test_an_index_without_a_table(self):
        with pytest.raises(ValueError, match=r"WarmStart\(samples="):
            Equilibrium(TanhCell(), warm_start=True)(torch.randn(2, 5), index=torch.arange(2))
        with pytest.raises(ValueError, match=r"WarmStart\(samples="):
            Equilibrium(TanhCell())(torch.randn(2, 5), index=torch.arange(2))
