"""The maps and energies, in units of order one, on states ``[batch, dim]``: plain tensor code of any dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Tensors = dict[str, Tensor]
"""x ``[batch, inputs]`` or ``[inputs]``, W ``[dim, dim]``, U ``[dim, inputs]``, b ``[dim]``, and the probe p
``[batch, dim]``, which is zero and whose gradient is the solution of the adjoint system itself."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sin": torch.sin,
    "softplus": functional.softplus,
    "sigmoid": torch.sigmoid,
    "atan": torch.atan,
    "relu": torch.relu,
    "abs": torch.abs,
    "hardtanh": functional.hardtanh,
}


def coupled(kind: str, z: Tensor) -> Tensor:
    """What the other samples add to each, ``[batch, dim]``."""
    batch = z.shape[0]
    if kind == "mean":
        return 0.3 * z.mean(0, keepdim=True).expand_as(z)
    if kind == "weak":
        return 1e-6 * z.sum(0, keepdim=True).expand_as(z)
    if kind == "graph":
        nodes = torch.arange(batch, dtype=z.dtype, device=z.device)
        weights = torch.exp(-(nodes[:, None] - 1.3 * nodes[None]).abs())
        return 0.4 * (weights / weights.sum(1, keepdim=True)) @ z
    if kind == "pair":
        return 0.4 * torch.cat((z[1:2], z[:1], torch.zeros_like(z[2:])))
    if kind == "one-way":
        return 0.5 * torch.cat((torch.zeros_like(z[:1]), z[:-1]))
    if kind == "attention":
        return 0.3 * torch.softmax(z @ z.mT, dim=1) @ z
    if kind == "batch-norm":
        centred = z - z.mean(0, keepdim=True)
        return 0.2 * centred / (centred.square().mean(0, keepdim=True) + 0.1).sqrt()
    return torch.zeros_like(z)


def inner(z: Tensor, t: Tensors) -> Tensor:
    """What the nested equilibrium y = 0.3 W y + sin(z) of each sample gives, in closed form."""
    eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    return torch.linalg.solve(eye - 0.3 * t["W"], torch.sin(z).mT).mT


def image(z: Tensor, t: Tensors, activation: str, coupling: str, nested: Callable[..., Tensor] | None) -> Tensor:
    """The map of a fixed point."""
    before = z @ t["W"].mT + t["x"] @ t["U"].mT + t["b"]
    if nested is not None:
        before = before + 0.2 * nested(z, t)
    if coupling:
        before = before + coupled(coupling, z)
    return ACTIVATIONS[activation](before) + t["p"]


def root(z: Tensor, t: Tensors, activation: str, coupling: str, nested: Callable[..., Tensor] | None) -> Tensor:
    """A map to be made zero."""
    return z - image(z, t, activation, coupling, nested) + 0.05 * z.pow(3)


def energy(z: Tensor, t: Tensors, activation: str, coupling: str, nested: Callable[..., Tensor] | None) -> Tensor:
    """Convex energies ``[batch]``."""
    drive = ACTIVATIONS[activation](t["x"] @ t["U"].mT + t["b"]) + t["p"]
    each = 0.5 * (z @ t["W"]).square() + 0.15 * z.square() + 0.05 * z.pow(4) - z * drive
    if nested is not None:
        each = each + 0.05 * nested(z, t).square()
    if coupling:
        each = each + 0.1 * (coupled(coupling, z) - z).square()
    return each.sum(-1)


def joint(z: Tensor, y: Tensor, t: Tensors, activation: str) -> tuple[Tensor, Tensor]:
    """The map ``[batch, dim]`` and the loss ``[batch]`` of a joint inference in the input y ``[batch, dim]``."""
    mapped = ACTIVATIONS[activation](0.7 * z @ t["W"].mT + 0.8 * y + t["x"] @ t["U"].mT) + t["p"]
    return mapped, (0.5 * (z - t["b"]).square() + 0.25 * y.square()).sum(-1)
