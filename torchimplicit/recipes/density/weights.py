"""The weights of a functional that some molecules depend on, as one vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchimplicit.models.orbital_free import Molecule, OrbitalFree
from torchimplicit.models.orbital_free.pairs import entries
from torchimplicit.recipes.runtime.optimize import Array


class Weights:
    """The trained weights: the network's, the coefficients of the s shells that occur and, if energies are trained,
    constants of the elements that occur.

    Attributes:
        network: bool ``[size]``: which are the network's.
    """

    def __init__(self, functional: OrbitalFree, molecules: Sequence[Molecule], constants: bool):
        self.functional = functional
        self._masks: dict[str, Tensor] = {}
        for name, p in functional.named_parameters():
            mask = torch.ones_like(p, dtype=torch.bool)
            if name == "reference":
                mask.zero_()
                for molecule in molecules:
                    scalar = molecule.angular == 0
                    mask[molecule.charges[molecule.atom][scalar], molecule.shell[scalar]] = True
            elif name == "pairs":
                mask.zero_()
                for molecule in molecules:
                    mask.view(-1)[entries(molecule, functional.config.pairs)[1]] = True
            elif name == "constants":
                mask.zero_()
                if constants:
                    mask[torch.cat([m.charges for m in molecules])] = True
            self._masks[name] = mask
        self.network = torch.cat(
            [torch.full((int(mask.sum()),), name.startswith("factor")) for name, mask in self._masks.items()]
        )

    def get(self) -> Array:
        """The current weights."""
        parameters = dict(self.functional.named_parameters())
        return torch.cat([parameters[k].detach()[mask] for k, mask in self._masks.items()]).numpy().copy()

    def put(self, vector: Array) -> None:
        """Set the functional's weights."""
        parts = torch.as_tensor(vector).split([int(mask.sum()) for mask in self._masks.values()])
        with torch.no_grad():
            for p, mask, part in zip(self.functional.parameters(), self._masks.values(), parts, strict=True):
                p[mask] = part

    def gradient(self) -> Array:
        """The accumulated gradient, which is then cleared."""
        parts = []
        for p, mask in zip(self.functional.parameters(), self._masks.values(), strict=True):
            parts.append((torch.zeros_like(p) if p.grad is None else p.grad)[mask])
            p.grad = None
        return torch.cat(parts).numpy()

    @property
    def names(self) -> list[str]:
        """Names of the parameters."""
        return [name for name, mask in self._masks.items() if bool(mask.any())]

    def columns(self, by_name: dict[str, Tensor]) -> Tensor:
        """Derivatives ``[n, *parameter.shape]``, by the parameters' names, as ``[n, size]``."""
        return torch.cat([by_name[name][:, self._masks[name]] for name in self.names], dim=1)
