import copy
import itertools

import pytest
import torch
from cells import TanhCell
from torch.utils.checkpoint import checkpoint

import torchimplicit as ti
from torchimplicit.nn import Budget, Equilibrium


def layer_with(budget, solver=None):
    return Equilibrium(TanhCell(), solver=solver or ti.FixedPointIteration(steps=1), budget=budget)


def steps_of(layer, calls=12):
    x = torch.randn(2, 5)
    taken = []
    for _ in range(calls):
        layer(x)
        taken.append(int(layer.solution.steps[0]))
    return taken


class TestRandomSteps:
    def test_lie_within_the_bounds_and_reach_them(self):
        taken = steps_of(layer_with(Budget(steps=(2, 4))), calls=60)
        assert set(taken) == {2, 3, 4}

    def test_are_those_of_the_seed(self):
        one, same, other = (steps_of(layer_with(Budget(steps=(1, 9), seed=seed))) for seed in (3, 3, 4))
        assert one == same != other

    def test_limit_a_solver_with_a_tolerance(self):
        budget = Budget(steps=(3, 7))
        chosen = budget.solver(ti.Anderson(rtol=1e-3))
        assert 3 <= chosen.max_steps <= 7
        assert chosen.rtol == 1e-3
        assert chosen.steps is None

    def test_zero_among_them(self):
        assert 0 in steps_of(layer_with(Budget(steps=(0, 1))), calls=20)

    def test_a_resumed_run_goes_on(self):
        layer = layer_with(Budget(steps=(1, 20)))
        steps_of(layer, calls=5)
        saved = copy.deepcopy(layer.state_dict())
        expected = steps_of(layer)
        resumed = layer_with(Budget(steps=(1, 20)))
        resumed.load_state_dict(saved)
        assert steps_of(resumed) == expected


class TestTolerances:
    def test_tighten_by_one_factor_and_stay(self):
        budget = Budget(rtol=(1e-1, 1e-5), atol=(1e-2, 1e-4), over=4)
        found = []
        for _ in range(6):
            found.append(budget.solver(ti.Anderson()))
            budget.step()
        torch.testing.assert_close([s.rtol for s in found], [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-5])
        assert found[-1].atol == 1e-4
        ratios = [b.atol / a.atol for a, b in itertools.pairwise(found[:5])]
        torch.testing.assert_close(ratios, [10**-0.5] * 4)

    def test_training_takes_more_steps_by_and_by(self):
        taken = steps_of(layer_with(Budget(rtol=(1e-1, 1e-6), over=8), ti.FixedPointIteration()))
        assert taken == sorted(taken)
        assert taken[-1] > taken[0]
        assert taken[-3:] == [taken[-1]] * 3


class TestCount:
    def test_of_solves_in_training_with_gradients(self):
        layer = layer_with(Budget(steps=(1, 9)))
        x = torch.randn(2, 5)
        layer(x)
        layer(x, solver=ti.Anderson())
        layer.eval()(x)
        with torch.no_grad():
            layer.train()(x)
        assert layer.budget.count == 1

    def test_evaluation_has_no_budget(self):
        layer = layer_with(Budget(steps=(5, 9)))
        assert steps_of(layer.eval(), calls=3) == [1, 1, 1]

    def test_manual(self):
        layer = layer_with(Budget(steps=(1, 100), manual=True))
        first = steps_of(layer, calls=3)
        layer.budget.step()
        assert len(set(first)) == 1
        assert steps_of(layer, calls=1) != first[:1]

    def test_a_checkpoint_needs_manual(self):
        x = torch.randn(2, 5, requires_grad=True)
        layer = layer_with(Budget(steps=(2, 9)))
        with pytest.raises(RuntimeError, match="manual=True"):
            checkpoint(layer, x, use_reentrant=False).sum().backward()
        layer = layer_with(Budget(steps=(2, 9), manual=True))
        checkpoint(layer, x, use_reentrant=False).sum().backward()

    def test_shows_what_it_is_given(self):
        assert "Budget(steps=(2, 9))" in repr(layer_with(Budget(steps=(2, 9))))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "needs steps"),
        ({"steps": (3, 2)}, "least <= most"),
        ({"steps": (1, 2.5)}, "whole numbers"),
        ({"rtol": (1e-2, 0.0), "over": 3}, "positive"),
        ({"rtol": (1e-2, 1e-3)}, "over is the number of training steps"),
        ({"steps": (1, 2), "over": 3}, "over is the number of training steps"),
        ({"atol": (1e-2, 1e-3), "over": 0}, "at least 1"),
    ],
)
def test_bad_budgets(options, said):
    with pytest.raises(ValueError, match=said):
        Budget(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": Budget(steps=(1, 2))}, "give solver="),
        ({"budget": Budget(steps=(1, 2)), "solver": ti.Anderson(), "compile": True}, "compile it again"),
        ({"budget": Budget(steps=(0, 2)), "solver": ti.Anderson()}, "max_steps"),
        ({"budget": Budget(rtol=(1.0, 0.1), over=2), "solver": ti.Anderson(steps=3)}, "rtol would have no effect"),
    ],
)
def test_budgets_that_do_not_fit_the_layer(options, said):
    with pytest.raises(ValueError, match=said):
        Equilibrium(TanhCell(), **options)
