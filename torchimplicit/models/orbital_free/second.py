"""The second derivatives of a functional, assembled point by point rather than product by product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchimplicit.models.orbital_free.functional import SHELLS, OrbitalFree, features
from torchimplicit.models.orbital_free.local import positive_part, thomas_fermi
from torchimplicit.models.orbital_free.molecule import Molecule
from torchimplicit.models.orbital_free.pairs import entries

COLUMNS_AT_ONCE = 64
"""Columns of a network's Hessian that are computed together."""


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
    total = molecule.coulomb + molecule.basis.products(torch.stack(rows) * molecule.quadrature)
    if functional.network is not None and functional.config.network_at == "density":
        network = functional.network
        slope = torch.func.grad(lambda q: network(q, molecule))
        total = total + torch.func.jacrev(slope, chunk_size=COLUMNS_AT_ONCE)(p.detach()).detach()
    return 0.5 * (total + total.T)


def mixed(functional: OrbitalFree, p: Tensor, molecule: Molecule, wrt: Sequence[str]) -> dict[str, Tensor]:
    """:math:`\\partial^2E/\\partial p\\,\\partial\\theta`, by the parameters' names, ``[n, *parameter.shape]``.

    Args:
        wrt: names of parameters, as in ``functional.named_parameters()``.

    Raises:
        ValueError: for weights of a network of the coefficients, of which there are too many to have them side by side.
    """
    if any(name.startswith("network.") for name in wrt):
        raise ValueError(
            "mixed gives second derivatives for every weight, and a network of the coefficients has too many of them: "
            "train it by the gradient of a loss"
        )
    parameters = {name: q.detach() for name, q in functional.named_parameters()}
    derivatives: dict[str, Tensor] = {}
    if factor := {name: parameters[name] for name in wrt if name.startswith("factor.")}:
        derivatives.update(_of_factor(functional, p, molecule, factor))
    linear = [name for name in ("reference", "pairs") if name in wrt]
    if linear:
        atoms, pairs = linear_columns(functional, molecule).split(
            [functional.reference.numel(), 0 if functional.pairs is None else functional.pairs.numel()], dim=1
        )
        parts = {"reference": atoms, "pairs": pairs}
        derivatives.update({name: parts[name].reshape(molecule.size, *parameters[name].shape) for name in linear})
    if "constants" in wrt:
        derivatives["constants"] = p.new_zeros(molecule.size, *parameters["constants"].shape)
    return derivatives


def linear_columns(functional: OrbitalFree, molecule: Molecule) -> Tensor:
    """The derivative of the linear term in its coefficients, those of the atoms and then those of the pairs,
    ``[n, coefficients]``."""
    atomic = functional.reference.numel()
    columns = molecule.weight.new_zeros(molecule.size, atomic)
    scalar = (molecule.angular == 0).nonzero()[:, 0]
    columns[scalar, molecule.charges[molecule.atom[scalar]] * SHELLS + molecule.shell[scalar]] = 1
    if functional.pairs is None:
        return columns
    rows, places, values = entries(molecule, functional.config.pairs)
    more = columns.new_zeros(molecule.size, functional.pairs.numel())
    return torch.cat((columns, more.index_put((rows, places), values, accumulate=True)), dim=1)


def _of_factor(functional: OrbitalFree, p: Tensor, molecule: Molecule, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Derivatives in the weights of the enhancement factor, on which :math:`\\tau_{TF}F_\\theta` alone depends."""
    factor = functional.factor
    assert factor is not None
    with torch.no_grad():
        fields = molecule.fields(p)
    own = {name.removeprefix("factor."): w for name, w in weights.items()}

    def slope(own: dict[str, Tensor], field: Tensor) -> Tensor:
        """Slope of the energy density at one point, ``[4]``."""

        def energy(field: Tensor) -> Tensor:
            plus = positive_part(field[:1], functional.config.width)
            seen = features(plus, field[1:].square().sum(dim=0, keepdim=True))
            return (thomas_fermi(plus) * torch.func.functional_call(factor, own, seen)[:, 0]).sum()

        return torch.func.grad(energy)(field)

    every = torch.func.vmap(torch.func.jacrev(slope), in_dims=(None, 1))
    sizes = [w.numel() for w in weights.values()]
    total = p.new_zeros(molecule.size, sum(sizes))
    for block in molecule.basis:
        slopes = every(own, fields[:, block.points])  # each [points, 4, *shape]
        of_points = torch.cat([slopes[name].flatten(2) for name in own], dim=2)
        of_points = (of_points * molecule.quadrature[block.points, None, None]).transpose(0, 1)
        total[block.functions] += block.values.flatten(1).to(of_points) @ of_points.flatten(0, 1)
    columns = total.split(sizes, dim=1)
    return {name: of.reshape(molecule.size, *w.shape) for (name, w), of in zip(weights.items(), columns, strict=True)}


def _first(functional: OrbitalFree, p: Tensor, molecule: Molecule) -> tuple[Tensor, Tensor]:
    """The density and its slopes, and the derivatives of the energy density in them, ``[4, points]`` each."""
    with torch.enable_grad():
        fields = molecule.fields(p.detach()).requires_grad_()
        energy = torch.stack(list(functional.local(fields[0], fields[1:]).values())).sum()
        (slopes,) = torch.autograd.grad(energy, fields, create_graph=True)
    return fields, slopes
