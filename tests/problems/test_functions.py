"""What a problem's function may return, and what is said where it may not."""

from __future__ import annotations

import pytest
import torch

import torchimplicit as ti
from torchimplicit import FixedPoint, Minimum, Root

STATE = torch.ones(4, 3)

WRONG = {
    "shape": (
        lambda z: z[:, :2],
        ValueError,
        r"has shape \(4, 2\) where the state has .*keep the shape",
    ),
    "one dimension": (lambda z: z.sum(1), ValueError, r"has shape \(4,\)"),
    "scalar": (lambda z: z.sum(), ValueError, r"has shape \(\)"),
    "dtype": (lambda z: z.double(), ValueError, "dtype torch.float64 but the state has torch.float32.*keep the dtype"),
    "integers": (lambda z: z.long(), ValueError, "dtype torch.int64"),
    "device": (lambda z: z.to("meta"), ValueError, "on meta but the state is on cpu: move"),
    "batch": (lambda z: z[:2], ValueError, "was given 4 samples and returned 2: the map must keep the batch"),
    "structure": (lambda z: [z], ValueError, "the result of f has the structure .* but z0 has .*same pytree"),
    "nothing": (lambda z: None, TypeError, "the result of f holds NoneType where z0 holds a tensor"),
    "number": (lambda z: 1.0, TypeError, "holds float"),
}


@pytest.mark.parametrize("kind", [FixedPoint, Root])
@pytest.mark.parametrize(("f", "error", "words"), WRONG.values(), ids=WRONG)
def test_refuses_a_result_unlike_the_state(kind, f, error, words):
    with pytest.raises(error, match=words):
        ti.solve(kind(f), STATE)


def test_refuses_a_tree_with_other_leaves():
    z0 = {"a": torch.ones(2, 3), "b": torch.ones(2, 1)}
    with pytest.raises(ValueError, match="leaf for leaf"):
        ti.solve(FixedPoint(lambda z: {"a": z["a"]}), z0)
    with pytest.raises(ValueError, match="different batch sizes, 2 and 1"):
        ti.solve(FixedPoint(lambda z: {"a": z["a"], "b": z["b"][:1]}), z0)


ENERGIES = {
    "scalar": (
        lambda z: z.square().sum(),
        ValueError,
        r"returned shape \(\), but must return \(4,\): one energy",
    ),
    "column": (lambda z: z.square().sum(1, keepdim=True), ValueError, r"returned shape \(4, 1\)"),
    "dtype": (lambda z: z.double().square().sum(1), ValueError, "returned torch.float64 for a state of torch.float32"),
    "number": (lambda z: 3.0, TypeError, "energy must return a tensor, but it returned float"),
    "detached": (lambda z: z.detach().square().sum(1), ValueError, "does not depend on the state.*without detach"),
}


@pytest.mark.parametrize(("energy", "error", "words"), ENERGIES.values(), ids=ENERGIES)
def test_refuses_a_wrong_energy(energy, error, words):
    with pytest.raises(error, match=words):
        ti.solve(Minimum(energy), STATE)


def test_one_system_has_one_energy():
    with pytest.raises(ValueError, match=r"must return \(\): a scalar, since the problem is not batched"):
        ti.solve(Minimum(lambda z: z.square().sum(1), batched=False), STATE)


@pytest.mark.parametrize(("kind", "name"), [(FixedPoint, "f"), (Root, "f"), (Minimum, "energy")])
def test_refuses_what_is_not_callable(kind, name):
    with pytest.raises(TypeError, match=rf"{name} must be callable as {name}\(z, \*args\), not Tensor"):
        kind(STATE)


def test_problems_are_frozen():
    problem = FixedPoint(torch.cos)
    with pytest.raises(AttributeError):
        problem.rowwise = True
    with pytest.raises(TypeError, match="unexpected keyword"):
        FixedPoint(torch.cos, row_wise=True)
