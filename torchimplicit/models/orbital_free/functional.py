"""An energy of the electron density, part known and part learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from torchimplicit.constraints import LinearEquality
from torchimplicit.coordinates import Metric
from torchimplicit.models.orbital_free.local import (
    lda,
    pbe,
    positive_part,
    reduced_gradient,
    thomas_fermi,
    weizsaecker,
)
from torchimplicit.models.orbital_free.molecule import Molecule
from torchimplicit.models.orbital_free.network import CoefficientNetwork, NetworkConfig
from torchimplicit.models.orbital_free.pairs import entries, shape
from torchimplicit.problems import Minimum

ELEMENTS, SHELLS = 37, 40
"""Nuclear charges (up to krypton), and s shells of one atom, for which the linear term has coefficients."""

ExchangeCorrelation = Literal["lda", "pbe"]
"""The uniform electron gas (Dirac; Perdew and Wang 1992), or with the density's gradient (Perdew, Burke and Ernzerhof
1996)."""

At = Literal["guess", "density"]
"""Where a network is evaluated: at the superposition of atoms, from which its energy is continued linearly, or at the
density itself."""

_EXCHANGE_CORRELATION: dict[ExchangeCorrelation, Callable[[Tensor, Tensor], Tensor]] = {
    "lda": lambda rho, sigma: lda(rho),
    "pbe": pbe,
}


@dataclass(frozen=True, kw_only=True)
class OrbitalFreeConfig:
    """The known part of the functional, and the size of what is learned.

    Attributes:
        weizsaecker: the share of the von Weizsäcker energy beside that of Thomas and Fermi.
        width: smoothing width of the density's positive part, in electrons per cubic bohr.
        penalty: the factor of :math:`\\int\\rho_-^2`, which holds negative densities down.
        hidden: hidden units of the enhancement factor, in each of ``layers`` layers; 0: no enhancement factor.
        pairs: nuclear charges of the elements whose neighbours enter the linear term; empty: none.
        exchange_correlation: ``"lda"`` or ``"pbe"``, as in the densities and energies that it is trained on.
        network: size of a message-passing energy of the coefficients; ``None``: no such energy.
        network_at: ``"density"``: the network's energy of the density is added. ``"guess"``: its tangent at the
            superposition of atoms is added, which is linear in the density: a learned external potential of geometry
            and guess, and the functional is as convex as without it.
    """

    weizsaecker: float = 0.4
    width: float = 1e-3
    penalty: float = 100.0
    hidden: int = 16
    layers: int = 2
    pairs: tuple[int, ...] = ()
    exchange_correlation: ExchangeCorrelation = "lda"
    network: NetworkConfig | None = None
    network_at: At = "density"

    def __post_init__(self) -> None:
        if self.network_at not in get_args(At):
            raise ValueError(
                f"OrbitalFreeConfig.network_at is {self.network_at!r}, and must be one of {', '.join(get_args(At))}"
            )
        if self.exchange_correlation not in get_args(ExchangeCorrelation):
            raise ValueError(
                f"OrbitalFreeConfig.exchange_correlation is {self.exchange_correlation!r}, and must be one of "
                f"{', '.join(get_args(ExchangeCorrelation))}"
            )
        for name in ("weizsaecker", "penalty", "hidden"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"OrbitalFreeConfig.{name} is {getattr(self, name)}, and must not be negative")
        if not self.width > 0 or self.layers < 1:
            raise ValueError(
                f"OrbitalFreeConfig: width ({self.width}) must be positive and layers ({self.layers}) >= 1"
            )


class OrbitalFree(nn.Module):
    """The total energy of a molecule as a functional of its density, in hartree.

    .. math::
        E(p) = \\int\\tau_{TF}(\\rho_+)\\,(1+F_\\theta(x)) + c\\,\\tau_{vW} + e_{xc}(\\rho_+) + \\gamma\\rho_-^2
        + \\tfrac12 p^TJp + \\langle v + a, p\\rangle + \\sum_{A}c_{Z_A} + E_{nn}

    with :math:`\\rho_+` the smooth positive part, and if asked for a network of the coefficients
    (:mod:`~torchimplicit.models.orbital_free.network`). Learned are the enhancement factor :math:`F_\\theta`, a
    network of the local features :math:`x=(\\log\\rho_+,\\log(1+s^2))`; the term :math:`a`, a coefficient for every
    element and s shell (the linear atomic reference of Zhang et al. 2024, M-OFDFT), and if asked for, what an atom's
    neighbours add to it (:mod:`~torchimplicit.models.orbital_free.pairs`); and one constant for each element. At first
    they are zero, which leaves the functional of Thomas, Fermi, Dirac and von Weizsäcker.

    The parameters are double precision: eigenvalues of the Hessian may span many orders of magnitude.

    Attributes:
        elements: the elements that the learned terms were fitted to, bool ``[37]`` by nuclear charge. Before a fit
            there are no learned terms and every molecule is accepted; afterwards a molecule with another element is
            refused, because it would lack the terms of that element.
    """

    elements: Tensor

    def __init__(self, config: OrbitalFreeConfig | None = None):
        super().__init__()
        self.config = config = config or OrbitalFreeConfig()
        self.factor = _network(config.hidden, config.layers) if config.hidden else None
        self.reference = nn.Parameter(torch.zeros(ELEMENTS, SHELLS, dtype=torch.float64))
        self.pairs = nn.Parameter(torch.zeros(shape(config.pairs), dtype=torch.float64)) if config.pairs else None
        self.constants = nn.Parameter(torch.zeros(ELEMENTS, dtype=torch.float64))
        self.network = CoefficientNetwork(config.network) if config.network else None
        self.register_buffer("elements", torch.zeros(ELEMENTS, dtype=torch.bool))

    def forward(self, p: Tensor, molecule: Molecule, tangent: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The energy of the coefficients ``p`` (``[n]``), a scalar.

        Args:
            p: coefficients.
            molecule: whose.
            tangent: of the network at the superposition of atoms, where that is what the functional has of it;
                ``None``: it is made here.

        Raises:
            ValueError: the molecule has an element that the functional was not fitted to.
        """
        return torch.stack(list(self.parts(p, molecule, tangent).values())).sum()

    def parts(self, p: Tensor, molecule: Molecule, tangent: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        """The energy's terms by name; scalars."""
        fields = molecule.fields(p)
        local = self.local(fields[0], fields[1:])
        return {
            **{name: molecule.quadrature @ density for name, density in local.items()},
            "hartree": 0.5 * p @ (molecule.coulomb @ p),
            "external": molecule.external @ p,
            "reference": self.linear(molecule) @ p,
            **({} if self.network is None else {"network": self.learned(p, molecule, tangent)}),
            "constants": self.constants[molecule.charges].sum(),
            "repulsion": molecule.repulsion,
        }

    def local(self, rho: Tensor, slopes: Tensor) -> dict[str, Tensor]:
        """The energy densities that depend on the density at a point, by name, ``[points]`` each; zero in a vacuum.

        Args:
            rho: :math:`\\rho`, ``[points]``.
            slopes: its derivatives in x, y, z, ``[3, points]``.
        """
        # the positive part of nothing is half its width, whose energy would grow with the extent of the grid
        vacuum = self._densities(rho.new_zeros(1), slopes.new_zeros(3, 1))
        return {name: density - vacuum[name] for name, density in self._densities(rho, slopes).items()}

    def _densities(self, rho: Tensor, slopes: Tensor) -> dict[str, Tensor]:
        config = self.config
        sigma = slopes.square().sum(dim=0)
        plus = positive_part(rho, config.width)
        gas = thomas_fermi(plus)
        kinetic = gas + config.weizsaecker * weizsaecker(plus, sigma, config.width)
        if self.factor is not None:
            kinetic = kinetic + gas * self.factor(features(plus, sigma))[:, 0]
        return {
            "kinetic": kinetic,
            "exchange_correlation": _EXCHANGE_CORRELATION[config.exchange_correlation](plus, sigma),
            "penalty": config.penalty * rho.clamp_max(0).square(),
        }

    def linear(self, molecule: Molecule) -> Tensor:
        """The coefficients :math:`a` of the linear term, ``[n]``.

        Raises:
            ValueError: the molecule has an element that the functional was not fitted to.
        """
        self.check(molecule)
        coefficients = self.reference[molecule.charges[molecule.atom], molecule.shell]
        linear = torch.where(molecule.angular == 0, coefficients, 0)
        if self.pairs is None:
            return linear
        rows, places, values = entries(molecule, self.config.pairs)
        return linear.index_add(0, rows, self.pairs.reshape(-1)[places] * values)

    def learned(self, p: Tensor, molecule: Molecule, tangent: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The network's energy, or its tangent's; a scalar. See :meth:`forward`."""
        assert self.network is not None
        if self.config.network_at == "density":
            return self.network(p, molecule)
        value, slope = self.network.tangent(molecule) if tangent is None else tangent
        return value + slope @ (p - molecule.guess)

    def check(self, molecule: Molecule) -> None:
        """Refuse a molecule with an element that the learned terms were not fitted to.

        Raises:
            ValueError: which elements they are.
        """
        if bool(self.elements[molecule.charges].all()) or not bool(self.elements.any()):
            return
        known = set(self.elements.nonzero()[:, 0].tolist())
        raise ValueError(
            f"{molecule.name} has elements of nuclear charge {sorted({*molecule.charges.tolist()} - known)}, and this "
            f"functional was fitted to those of charge {sorted(known)}: its energy and density there would "
            "be wrong by hartrees. Train it on molecules with these elements too"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Takes the weights of earlier versions too, which ended at argon and did not know their elements."""
        for name in ("reference", "constants"):
            held = state_dict.get(prefix + name)
            if held is not None and held.shape != (size := getattr(self, name).shape) and held.dim() == len(size):
                whole = held.new_zeros(size)
                whole[tuple(map(slice, held.shape))] = held
                state_dict[prefix + name] = whole
        if prefix + "reference" in state_dict:
            state_dict.setdefault(prefix + "elements", (state_dict[prefix + "reference"] != 0).any(dim=1))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def problem(self, molecule: Molecule, metric: Metric | None = None) -> Minimum:
        """The density of least energy with the molecule's number of electrons, ``solve(problem, molecule.guess)``.

        Args:
            metric: ``Metric(molecule.overlap)`` for coordinates in which lengths are those of densities, kept by the
                caller since it takes an eigendecomposition; ``None``: the coefficients themselves.
        """
        constraint = LinearEquality(molecule.weight, molecule.electrons)
        fixed = self.network is not None and self.config.network_at == "guess"
        tangent = self.network.tangent(molecule) if fixed and self.network is not None else None
        return Minimum(partial(self._energy, molecule, tangent), constraint, batched=False, metric=metric)

    def _energy(self, molecule: Molecule, tangent: tuple[Tensor, Tensor] | None, p: Tensor) -> Tensor:
        return self.forward(p, molecule, tangent)


def _network(hidden: int, layers: int) -> nn.Module:
    """A network from two features to a number, which is zero at first."""
    widths = [2, *[hidden] * layers]
    inner = [nn.Linear(before, after, dtype=torch.float64) for before, after in pairwise(widths)]
    last = nn.Linear(hidden, 1, dtype=torch.float64)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*[layer for linear in inner for layer in (linear, nn.Tanh())], last)


def features(rho: Tensor, sigma: Tensor) -> Tensor:
    """Return the features of the enhancement factor, ``[points, 2]``, of order one.

    Args:
        rho: positive.
        sigma: :math:`|\\nabla\\rho|^2`.
    """
    return torch.stack((0.25 * torch.log(rho), 0.5 * torch.log1p(reduced_gradient(rho, sigma))), dim=1)
