"""What an evaluation tells of a state."""

from __future__ import annotations

import torch

from torchimplicit.problems import Judgement, Point


def test_points_at_rest_keep_what_they_are_judged_by() -> None:
    mask = torch.tensor([True, False, True])
    one, other = (
        Point(
            sign * torch.arange(6.0).reshape(3, 2),
            torch.full((3, 2), sign),
            image=torch.ones(3, 2),
            error=torch.full((3,), sign),
            judgement=Judgement(*(torch.full((3,), k * sign) for k in (2, 3, 4, 5))),
        )
        for sign in (1.0, -1.0)
    )
    still, moving = one.stopped(mask, other), one.select(mask, other)
    assert torch.equal(still.z, moving.z)
    assert torch.equal(still.size(), moving.size())
    assert all(map(torch.equal, still.judgement, moving.judgement))  # type: ignore[arg-type]
    assert torch.equal(still.residual, torch.zeros(3, 2))
    assert torch.equal(still.image, still.z)  # type: ignore[arg-type]
    assert still.energy is None
