"""Eigenvalues from a Krylov space."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchimplicit.precision import widened
from torchimplicit.state import row_norm


class RitzPairs(NamedTuple):
    """Approximate eigenvalues, complex ``[batch, k]``, and their vectors as combinations ``[batch, k, k]`` of a basis
    ``[batch, k, dim]``."""

    values: Tensor
    combinations: Tensor
    basis: Tensor

    def of(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """Pair ``which`` (``[batch]``) of each sample: value ``[batch]`` and vector ``[batch, dim]``, both complex."""
        rows = torch.arange(len(which), device=which.device)
        chosen = self.combinations[rows, :, which]
        parts = (torch.bmm(part[:, None].to(self.basis.dtype), self.basis)[:, 0] for part in (chosen.real, chosen.imag))
        return self.values[rows, which], torch.complex(*parts)

    def largest(self) -> tuple[Tensor, Tensor]:
        """The pair of largest modulus."""
        return self.of(self.values.abs().argmax(dim=1))


def arnoldi(product: Callable[[Tensor], Tensor], start: Tensor, size: int) -> RitzPairs:
    """The Ritz pairs of the Krylov space of ``size`` products from ``start`` (``[batch, dim]``; Saad 2011, section
    6.2)."""
    batch, dim = start.shape
    work = widened(start)
    tiny = torch.finfo(work.dtype).tiny
    basis = work.new_zeros(batch, size + 1, dim)
    hessenberg = work.new_zeros(batch, size + 1, size)
    basis[:, 0] = work / row_norm(work).clamp_min(tiny)[:, None]
    for j in range(size):
        w = widened(product(basis[:, j].to(start.dtype)))
        scale = row_norm(w)
        for _ in range(2):  # twice is enough (Kahan)
            overlap = torch.bmm(basis[:, : j + 1], w[:, :, None])
            w = w - torch.bmm(overlap.transpose(1, 2), basis[:, : j + 1])[:, 0]
            hessenberg[:, : j + 1, j] += overlap[:, :, 0]
        norm = row_norm(w)
        # an invariant space is exhausted: what is left is rounding, and the space ends here
        norm = torch.where(norm > 1e-6 * torch.finfo(start.dtype).eps ** 0.5 * scale, norm, 0)
        hessenberg[:, j + 1, j] = norm
        basis[:, j + 1] = torch.where(norm[:, None] > 0, w / norm.clamp_min(tiny)[:, None], 0)
    values, vectors = torch.linalg.eig(hessenberg[:, :size])
    return RitzPairs(values, vectors, basis[:, :size])
