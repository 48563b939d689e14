from __future__ import annotations

import torch

from torchimplicit.solvers.history import History


def test_a_ring_holds_the_latest():
    history = History.empty(torch.zeros(2, 3), 2)
    assert history.vectors.shape == (2, 0, 3)
    for slot, value in ((0, 1.0), (1, 2.0), (0, 3.0)):
        with torch.no_grad():
            history = history.put(slot, torch.full((2, 3), value))
    assert history.filled == 2
    assert history.vectors[:, :, 0].tolist() == [[3.0, 2.0]] * 2


def test_autograd_may_look_on():
    x = torch.ones(1, 2, requires_grad=True)
    history = History.empty(x, 2).put(0, 2 * x)
    later = history.put(0, 3 * x)
    (grad,) = torch.autograd.grad(history.vectors.sum() + later.vectors.square().sum(), x)
    assert torch.equal(grad, torch.full((1, 2), 2.0 + 18.0))


def test_half_precision_is_kept_in_float32():
    assert History.empty(torch.zeros(1, 2, dtype=torch.bfloat16), 1).ring.dtype == torch.float32
