"""The projection onto the intersection of a ball and a box, against bisection, and its derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from torchimplicit.problems.sets import FlatBox, FlatCut

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def projected(z: Tensor, *tensors: Tensor) -> Tensor:
    return FlatCut(FlatBox(tensors[:2]), tensors).project(z, z[:, :1], *tensors)


def bisected(z: Tensor, low: Tensor, high: Tensor, radius: Tensor, center: Tensor) -> Tensor:
    """The same by 200 halvings of the interval of t."""

    def at(t: Tensor) -> Tensor:
        return torch.clamp(center + t * (z - center), low, high)

    def far(t: Tensor) -> Tensor:
        return torch.linalg.vector_norm(at(t) - center, dim=1, keepdim=True) > radius

    near, there = torch.zeros_like(z[:, :1]), torch.ones_like(z[:, :1])
    outside = far(there)
    for _ in range(200):
        middle = (near + there) / 2
        near, there = torch.where(far(middle), near, middle), torch.where(far(middle), middle, there)
    return at(torch.where(outside, near, 1))


CASES = {
    "center in the box": {},
    "center on faces": {"faces": True},
    "center outside": {"shift": 0.3},
    "some bounds are equal": {"equal": True},
    "no lower bounds": {"unbounded": True},
    "points far away": {"size": 1e4},
    "points inside": {"size": 1e-3},
    "one sample of one entry": {"shape": (1, 1)},
    "float32": {"dtype": torch.float32},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("seed", range(3))
def test_against_bisection(case: dict, seed: int) -> None:
    shape, dtype = case.get("shape", (30, 40)), case.get("dtype", F64)
    center, below, above, way = (normal(*shape, seed=10 * seed + i) for i in range(4))
    low, high = center - below.abs() + case.get("shift", 0), center + above.abs() + case.get("shift", 0)
    if "faces" in case:
        low = torch.where(way > 0, center, low)
    if "equal" in case:
        high = torch.where(way > 0, low, high)
    if "unbounded" in case:
        low = torch.full_like(low, -torch.inf)
    gap = torch.linalg.vector_norm(torch.clamp(center, low, high) - center, dim=1, keepdim=True)
    radius = gap + normal(shape[0], 1, seed=seed).abs()
    given = [t.to(dtype) for t in (center + case.get("size", 3.0) * way, low, high, radius, center)]
    found, right = projected(*given), bisected(*given)
    scale = torch.finfo(dtype).eps ** 0.75
    torch.testing.assert_close(found, right, rtol=scale, atol=scale)
    assert ((found >= given[1]) & (found <= given[2])).all()


def test_degenerate_samples() -> None:
    z, low, high, center = normal(5, 4), torch.full((1, 4), -1.0).double(), torch.ones(1, 4).double(), normal(5, 4) / 4
    radius = torch.tensor([[0.0], [1.0], [1.0], [0.5], [torch.inf]]).double()
    z[1], z[2, 0], z[3] = center[1], torch.nan, center[3]
    found = projected(z, low, high, radius, center)
    torch.testing.assert_close(found[[0, 1, 3]], center[[0, 1, 3]])
    assert found[2].isnan().any()
    torch.testing.assert_close(found[4], z[4].clamp(-1, 1))


def test_derivatives() -> None:
    z, low, high = 2 * normal(4, 6), -normal(4, 6, seed=1).abs() - 0.1, normal(4, 6, seed=2).abs() + 0.1
    radius, center = torch.tensor([[0.5], [0.8], [1.2], [90.0]]).double(), 0.1 * normal(4, 6, seed=3)
    inputs = tuple(t.requires_grad_() for t in (z, low, high, radius, center))
    assert gradcheck(projected, inputs, check_forward_ad=True)
    assert gradgradcheck(projected, inputs)
