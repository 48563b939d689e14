"""A small message-passing network of a density's coefficients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Self, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from torchimplicit._torch import outside_transforms
from torchimplicit.closure import is_transformed
from torchimplicit.models.orbital_free.harmonics import of_directions
from torchimplicit.models.orbital_free.molecule import Molecule

SCALE = 0.1
"""The energy of an atom, in hartree, for an output of one of the last layer."""

SPREAD_FLOOR = 0.05
"""The least standard deviation that a coefficient is divided by: those that hardly vary stay small."""


@final
@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The size of a :class:`CoefficientNetwork`, and the density bases that it takes.

    Attributes:
        elements: nuclear charges.
        shells: the most shells of the density basis that one atom has, for l = 0, 1, and so on.
        width: features of each atom.
        channels: combinations of an atom's shells, for each l > 0.
        radial: number of Gaussians in the distance of two atoms.
        rounds: rounds of message passing; with 0 an atom knows its own density and, through the edges' vectors, that of
            its neighbours.
        reach: the distance in bohr at which two atoms no longer see each other.
    """

    elements: tuple[int, ...]
    shells: tuple[int, ...]
    width: int = 48
    channels: int = 6
    radial: int = 12
    rounds: int = 2
    reach: float = 12.0

    def __post_init__(self) -> None:
        if not self.elements or not self.shells or min(self.shells) < 1:
            raise ValueError(
                f"NetworkConfig needs elements ({self.elements}) and shells of each l, at least one ({self.shells})"
            )
        for name in ("width", "channels", "radial"):
            if getattr(self, name) < 1:
                raise ValueError(f"NetworkConfig.{name} is {getattr(self, name)}, and must be at least 1")
        if self.rounds < 0 or not self.reach > 1:
            raise ValueError(
                f"NetworkConfig: rounds ({self.rounds}) must not be negative and reach ({self.reach}) beyond one bohr"
            )

    @classmethod
    def of(cls, molecules: Sequence[Molecule], **more: Any) -> Self:
        """The config for the elements and bases of some molecules; ``more`` sets the other fields."""
        elements = tuple(sorted({int(charge) for molecule in molecules for charge in molecule.charges}))
        largest = max(int(molecule.angular.max()) for molecule in molecules)
        shells = [
            1 + max(int(m.shell[m.angular == l].max()) for m in molecules if bool((m.angular == l).any()))
            for l in range(largest + 1)
        ]
        return cls(elements=elements, shells=tuple(shells), **more)

    @property
    def places(self) -> list[int]:
        """Where an atom's coefficients of each l begin in its row, and the row's length."""
        return list(accumulate((count * (2 * l + 1) for l, count in enumerate(self.shells)), initial=0))


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Graph:
    """The geometry of one or several molecules, as the network takes it beside their coefficients.

    Attributes:
        kinds: number of each atom's element among the config's, ``[atoms]``.
        first, second: the atoms of each directed edge, ``[edges]``.
        distance: distance of the two, in bohr, ``[edges]``.
        harmonics: harmonics of the direction from first to second, ``[edges, 2l+1]`` for each l, of unit norm.
    """

    kinds: Tensor
    first: Tensor
    second: Tensor
    distance: Tensor
    harmonics: tuple[Tensor, ...]

    @classmethod
    def of(cls, molecule: Molecule, config: NetworkConfig) -> Self:
        """The graph of one molecule.

        Raises:
            ValueError: the network was not made for its elements.
        """
        charges, kinds = molecule.charges, molecule.kinds(config.elements)
        if bool((kinds < 0).any()):
            raise ValueError(
                f"{molecule.name} has elements of nuclear charge {sorted({*charges[kinds < 0].tolist()})}, and this "
                f"network was made for those of charge {sorted(config.elements)}"
            )
        away = molecule.positions[None] - molecule.positions[:, None]
        apart = ~torch.eye(len(charges), dtype=torch.bool, device=charges.device)
        near = apart & (away.detach().norm(dim=2) < config.reach)
        first, second = near.nonzero(as_tuple=True)
        away = away[first, second]
        distance = away.norm(dim=1)
        harmonics = tuple(of_directions(away / distance[:, None], len(config.shells) - 1))
        return cls(kinds=kinds, first=first, second=second, distance=distance, harmonics=harmonics)

    @classmethod
    def joined(cls, graphs: Sequence[Self]) -> Self:
        """Several graphs as one, one after the other; a graph may be there several times."""
        starts = list(accumulate((len(graph.kinds) for graph in graphs), initial=0))
        return cls(
            kinds=torch.cat([graph.kinds for graph in graphs]),
            first=torch.cat([graph.first + start for graph, start in zip(graphs, starts, strict=False)]),
            second=torch.cat([graph.second + start for graph, start in zip(graphs, starts, strict=False)]),
            distance=torch.cat([graph.distance for graph in graphs]),
            harmonics=tuple(torch.cat(ones) for ones in zip(*(graph.harmonics for graph in graphs), strict=True)),
        )

    def to(self, dtype: torch.dtype) -> Self:
        """In another precision."""
        harmonics = tuple(one.to(dtype) for one in self.harmonics)
        return replace(self, distance=self.distance.to(dtype), harmonics=harmonics)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """How the coefficients of a molecule are laid out as one row per atom.

    Attributes:
        atoms: number of atoms.
        length: length of a row.
        place: place of each coefficient in the flattened rows, ``[n]``.
        root: the root of the overlap within each atom and l, ``[n, n]``: in its coordinates the functions of an atom
            and l are orthonormal, and no shell is nearly a combination of others (Löwdin 1950). M-OFDFT's natural
            reparametrization (Zhang et al. 2024) takes the root of the whole molecule's overlap; this one leaves each
            coefficient at its atom.
    """

    atoms: int
    length: int
    place: Tensor
    root: Tensor

    @classmethod
    def of(cls, molecule: Molecule, config: NetworkConfig) -> Self:
        """The layout of one molecule.

        Raises:
            ValueError: its basis has more shells, or a larger l, than the network was made for.
        """
        angular, shell, atom = molecule.angular, molecule.shell, molecule.atom
        limits = torch.tensor([*config.shells, 0]).to(shell)
        if bool((shell >= limits[angular.clamp_max(len(config.shells))]).any()):
            raise ValueError(
                f"{molecule.name} has a density basis of more shells than the {config.shells} (of l = 0, 1, ...) that "
                "this network was made for: compute it with the settings of the molecules of training"
            )
        begins = torch.tensor(config.places).to(shell)
        place = atom * config.places[-1] + begins[angular] + shell * (2 * angular + 1) + molecule.order
        alike = (atom[:, None] == atom) & (angular[:, None] == angular)
        values, vectors = torch.linalg.eigh(torch.where(alike, molecule.overlap, 0))
        return cls(
            atoms=len(molecule.charges),
            length=config.places[-1],
            place=place,
            root=(vectors * values.clamp_min(0).sqrt()) @ vectors.T,
        )

    def __call__(self, p: Tensor) -> Tensor:
        """Arrange coefficients ``[n]`` or ``[k, n]`` by atom: ``[atoms, length]`` or ``[k, atoms, length]``, with zeros
        where an atom has fewer functions."""
        x = p @ self.root
        rows = x.new_zeros(*x.shape[:-1], self.atoms * self.length).index_copy(-1, self.place, x)
        return rows.reshape(*x.shape[:-1], self.atoms, self.length)


@final
class CoefficientNetwork(nn.Module):
    """An energy of a molecule's density, by its coefficients around each atom, in hartree.

    An atom's features are made of its s coefficients and of the products of its higher shells with each other
    that do not depend on how the molecule is turned; messages along edges carry the neighbours' features,
    their distance, and the components of both atoms' shells along the edge. All are invariants, so that the energy is,
    and its slope turns with the molecule. An element's mean coefficients and their spread (:meth:`scale`) are taken out
    first.

    The last layer is zero at first, and so is the energy.

    Args:
        config: its size.
    """

    mean: Tensor
    spread: Tensor
    centres: Tensor

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.config = config
        kinds, shells, width, channels = len(config.elements), config.shells, config.width, config.channels
        double: dict[str, Any] = {"dtype": torch.float64}
        self.register_buffer("mean", torch.zeros(kinds, config.places[-1], **double))
        self.register_buffer("spread", torch.ones(kinds, config.places[-1], **double))
        self.register_buffer("centres", torch.linspace(1.0, 0.75 * config.reach, config.radial, **double))
        higher = shells[1:]
        self.scalar = nn.Parameter(torch.randn(kinds, shells[0], width, **double) / shells[0] ** 0.5)
        self.bias = nn.Parameter(0.3 * torch.randn(kinds, width, **double))
        self.mixing = nn.ParameterList(
            [nn.Parameter(torch.randn(kinds, count, channels, **double) / count**0.5) for count in higher]
        )
        self.along = nn.Parameter(torch.randn(kinds, shells[0], 2 * channels, **double) / shells[0] ** 0.5)
        products = len(higher) * channels * (channels + 1) // 2
        edges = 2 * len(higher) * channels + config.radial
        self.start = _layers(width + products, width, width)
        self.edge = nn.ModuleList([nn.Linear(edges, width, **double) for _ in range(config.rounds)])
        self.sent = nn.ModuleList([nn.Linear(width, width, bias=False, **double) for _ in range(config.rounds)])
        self.taken = nn.ModuleList([nn.Linear(width, width, bias=False, **double) for _ in range(config.rounds)])
        self.filter = nn.ModuleList([nn.Linear(config.radial, width, **double) for _ in range(config.rounds)])
        self.update = nn.ModuleList([_layers(2 * width, width, width) for _ in range(config.rounds)])
        self.energy = _layers(width, width, 1, nothing=True)
        self.kind = nn.Parameter(torch.randn(kinds, 4, **double))
        self.linear = nn.Parameter(torch.zeros(kinds, shells[0], **double))
        self.constant = nn.Parameter(torch.zeros(kinds, **double))
        self.bond = _layers(config.radial + 8, width, (len(higher) + 2) * channels, nothing=True)

    @torch.no_grad()
    def scale(self, rows: list[Tensor], kinds: list[Tensor]) -> None:
        """Take the mean of the s coefficients and the standard deviation of every shell from some densities, for each
        element, as M-OFDFT rescales each dimension (Zhang et al. 2024); one deviation for a whole shell, so that the
        energy does not depend on how the molecule is turned.

        Args:
            rows: the rows of each density, ``[..., atoms, length]``.
            kinds: the kinds of each one's atoms, see :class:`Graph`.
        """
        config = self.config
        self.mean.zero_()
        self.spread.fill_(1)
        for kind in range(len(config.elements)):
            there = torch.cat(
                [
                    one[..., which == kind, :].reshape(-1, config.places[-1])
                    for one, which in zip(rows, kinds, strict=True)
                ]
            )
            if not len(there):
                continue
            self.mean[kind, : config.shells[0]] = there.mean(dim=0)[: config.shells[0]]
            square = (there - self.mean[kind]).square().mean(dim=0)
            for l, count in enumerate(config.shells):
                part = slice(config.places[l], config.places[l + 1])
                of_shells = square[part].view(count, 2 * l + 1).mean(dim=1).sqrt().clamp_min(SPREAD_FLOOR)
                self.spread[kind, part] = of_shells.repeat_interleave(2 * l + 1)

    def forward(self, p: Tensor, molecule: Molecule) -> Tensor:
        """The energy of the coefficients ``p`` (``[n]``), a scalar.

        Raises:
            ValueError: the network was not made for the molecule's elements or its basis.
        """
        graph, rows = self.known(molecule)
        return self.of_rows(rows(p), graph).sum()

    def tangent(self, molecule: Molecule) -> tuple[Tensor, Tensor]:
        """The energy of the superposition of atoms, a scalar, and its slope there, ``[n]``; both are differentiable in
        the weights where gradients are recorded."""
        recorded = torch.is_grad_enabled()
        with torch.enable_grad():
            guess = molecule.guess.detach().clone().requires_grad_()
            value = self(guess, molecule)
            (slope,) = torch.autograd.grad(value, guess, create_graph=recorded)
        return (value, slope) if recorded else (value.detach(), slope)

    def known(self, molecule: Molecule) -> tuple[Graph, Rows]:
        """A molecule's, remembered for as long as it lives."""
        if molecule.positions.requires_grad or is_transformed(molecule.positions):
            return Graph.of(molecule, self.config), Rows.of(molecule, self.config)
        held = _KNOWN.setdefault(molecule, {})
        if self.config not in held:
            # what is remembered must outlive a transform of torch.func within which it is asked for first
            with torch.no_grad(), outside_transforms():
                held[self.config] = Graph.of(molecule, self.config), Rows.of(molecule, self.config)
        return held[self.config]

    def of_rows(self, rows: Tensor, graph: Graph) -> Tensor:
        """The energy of each atom, ``[atoms]``, by its row (``[atoms, length]``)."""
        config, kinds, first, second = self.config, graph.kinds, graph.first, graph.second
        x = (rows - self.mean[kinds]) / self.spread[kinds]
        scalars = x[:, : config.shells[0]]
        features = [silu(torch.einsum("as,asf->af", scalars, self.scalar[kinds]) + self.bias[kinds])]
        ahead, behind = [], []
        upper, lower = torch.triu_indices(config.channels, config.channels, device=rows.device)
        for l, (count, mixing) in enumerate(zip(config.shells[1:], self.mixing, strict=True), start=1):
            part = x[:, config.places[l] : config.places[l + 1]].reshape(-1, count, 2 * l + 1)
            vectors = torch.einsum("asm,asc->acm", part, mixing[kinds])
            products = torch.einsum("acm,adm->acd", vectors, vectors) / (2 * l + 1)
            features.append(torch.tanh(0.1 * products[:, upper, lower]))
            along = graph.harmonics[l][:, None]
            ahead.append((vectors[first] * along).sum(dim=2))
            behind.append((vectors[second] * along).sum(dim=2) * (-1) ** l)
        h = self.start(torch.cat(features, dim=1))
        width = (self.centres[-1] - self.centres[0]) / max(1, config.radial - 1)
        radial = torch.exp(-0.5 * ((graph.distance[:, None] - self.centres) / width).square())
        seen = 0.5 * (1 + torch.cos(math.pi * (graph.distance / config.reach).clamp_max(1)))[:, None]
        edges = torch.cat((*ahead, *behind, radial), dim=1)
        for edge, sent, taken, filtered, update in zip(
            self.edge, self.sent, self.taken, self.filter, self.update, strict=True
        ):
            message = silu(edge(edges) + taken(h)[first] + sent(h)[second]) * filtered(radial) * seen
            h = h + update(torch.cat((h, torch.zeros_like(h).index_add(0, first, message)), dim=1))
        of_atoms = self.energy(h)[:, 0] + self.constant[kinds] + (scalars * self.linear[kinds]).sum(dim=1)
        bond = self.bond(torch.cat((radial, self.kind[kinds[first]], self.kind[kinds[second]]), dim=1)) * seen
        shared = torch.cat((*ahead, torch.einsum("as,asc->ac", scalars, self.along[kinds])[first]), dim=1)
        return SCALE * of_atoms.index_add(0, first, (bond * shared).sum(dim=1))


_KNOWN: WeakKeyDictionary[Molecule, dict[NetworkConfig, tuple[Graph, Rows]]] = WeakKeyDictionary()


def _layers(taken: int, hidden: int, outputs: int, nothing: bool = False) -> nn.Sequential:
    """Two, whose output is zero at first if asked for."""
    last = nn.Linear(hidden, outputs, dtype=torch.float64)
    if nothing:
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(taken, hidden, dtype=torch.float64), nn.SiLU(), last)
