"""The second derivatives of a functional, assembled point by point rather than product by product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchimplicit.models.orbital_free.functional import OrbitalFree
from torchimplicit.models.orbital_free.molecule import Molecule
from torchimplicit.models.orbital_free.starting import linear_columns

POINTS_AT_ONCE = 4096
"""Of the mixed derivatives, each point having one for every weight."""


def hessian(functional: OrbitalFree, p: Tensor, molecule: Molecule) -> Tensor:
    """:math:`\\partial^2E/\\partial p\\,\\partial p^T`, ``[n, n]``.

    The local terms depend on four numbers at each point, the density and its slopes, so that
    :math:`H=J+\\sum_{kl}\\Phi_k^T\\,\\mathrm{diag}(w\\,e_{kl})\\,\\Phi_l`: four backward passes and matrix products,
    where n Hessian-vector products would take n passes.
    """
    fields, slopes = _first(functional, p, molecule)
    rows = []
    for k in range(4):
        one = torch.zeros_like(slopes)
        one[k] = 1
        (row,) = torch.autograd.grad(slopes, fields, one, retain_graph=k < 3)
        rows.append(row)
    basis = torch.cat((molecule.values[None], molecule.gradients))  # [4, points, n]
    total = molecule.coulomb.clone()
    for k, row in enumerate(rows):
        weighted = (molecule.quadrature * row)[:, :, None] * basis
        total += basis[k].T @ weighted.sum(dim=0)
    return 0.5 * (total + total.T)


def mixed(functional: OrbitalFree, p: Tensor, molecule: Molecule, wrt: Sequence[str]) -> dict[str, Tensor]:
    """:math:`\\partial^2E/\\partial p\\,\\partial\\theta`, by the parameters' names, ``[n, *parameter.shape]``.

    Args:
        wrt: which parameters, as ``functional.named_parameters()`` names them.
    """
    parameters = {name: q.detach() for name, q in functional.named_parameters()}
    found: dict[str, Tensor] = {}
    network = [name for name in wrt if name.startswith("factor.")]
    if network:
        found.update(_of_network(functional, p, molecule, {name: parameters[name] for name in network}))
    linear = [name for name in ("reference", "pairs") if name in wrt]
    if linear:
        atoms, pairs = linear_columns(functional, molecule).split(
            [functional.reference.numel(), 0 if functional.pairs is None else functional.pairs.numel()], dim=1
        )
        parts = {"reference": atoms, "pairs": pairs}
        found.update({name: parts[name].reshape(molecule.size, *parameters[name].shape) for name in linear})
    if "constants" in wrt:
        found["constants"] = p.new_zeros(molecule.size, *parameters["constants"].shape)
    return found


def _of_network(
    functional: OrbitalFree, p: Tensor, molecule: Molecule, weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    basis = torch.cat((molecule.values[None], molecule.gradients))
    with torch.no_grad():
        fields = torch.cat((molecule.density(p)[None], molecule.slopes(p)))

    def slope(weights: dict[str, Tensor], field: Tensor) -> Tensor:
        """Of the energy density at one point, ``[4]``."""

        def energy(field: Tensor) -> Tensor:
            local = torch.func.functional_call(_Local(functional), weights, (field[:1], field[1:, None]))
            return local.sum()

        return torch.func.grad(energy)(field)

    every = torch.func.vmap(torch.func.jacrev(slope), in_dims=(None, 1))
    found = {name: p.new_zeros(molecule.size, w.numel()) for name, w in weights.items()}
    prefixed = {f"functional.{name}": w for name, w in weights.items()}
    for start in range(0, len(molecule.quadrature), POINTS_AT_ONCE):
        there = slice(start, start + POINTS_AT_ONCE)
        slopes = every(prefixed, fields[:, there])  # each [points, 4, *shape]
        for name in weights:
            per_point = slopes[f"functional.{name}"].flatten(2) * molecule.quadrature[there, None, None]
            for k in range(4):
                found[name] += basis[k, there].T @ per_point[:, k]
    return {name: found[name].reshape(molecule.size, *w.shape) for name, w in weights.items()}


class _Local(torch.nn.Module):
    """The sum of a functional's local energy densities, so that its weights can be replaced."""

    def __init__(self, functional: OrbitalFree):
        super().__init__()
        self.functional = functional

    def forward(self, rho: Tensor, slopes: Tensor) -> Tensor:
        return torch.stack(list(self.functional.local(rho, slopes).values())).sum(dim=0)


def _first(functional: OrbitalFree, p: Tensor, molecule: Molecule) -> tuple[Tensor, Tensor]:
    """The density and its slopes, and the derivatives of the energy density in them, ``[4, points]`` each."""
    with torch.enable_grad():
        fields = torch.cat((molecule.density(p.detach())[None], molecule.slopes(p.detach()))).requires_grad_()
        energy = torch.stack(list(functional.local(fields[0], fields[1:]).values())).sum()
        (slopes,) = torch.autograd.grad(energy, fields, create_graph=True)
    return fields, slopes
