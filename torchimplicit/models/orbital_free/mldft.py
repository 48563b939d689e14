"""Functionals of the package ``mldft`` (STRUCTURES25; Remme et al. 2025) as energies to be minimized and fine-tuned.

Nothing here imports the package: an ``mldft`` network is a module that is called with a sample, whose ``coeffs`` are
the density's coefficients, and gives a pair of the energy and a proposed displacement. mldft 0.0.2 pins torch 2.4.1 and
PySCF 2.4.0, and this library needs a newer torch: pip does not install both. Tested on the interface alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from torchimplicit.constraints import LinearEquality
from torchimplicit.problems import Minimum

ANALYTIC = {"kin_plus_xc": True, "tot": False}
"""The targets of a network, and whether the Coulomb energy and the nuclei's attraction come beside it."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class MldftFunctional:
    """The energy of an ``mldft`` network.

    The coefficients are those of the sample, as ``mldft``'s transforms have left it: with its natural
    reparametrization their metric is that of the density already.

    Args:
        net: the ``net`` of an ``MLDFTLitModule``; in evaluation mode, since dropout would make another energy of every
            evaluation.
        target_key: the target of the module, as it names it.
    """

    net: nn.Module
    target_key: str = "kin_plus_xc"

    def __post_init__(self) -> None:
        if self.target_key not in ANALYTIC:
            raise ValueError(
                f"MldftFunctional.target_key is {self.target_key!r}, and must be one of {', '.join(ANALYTIC)}: what "
                "the others lack is computed by libxc on a grid there, which gives no second derivatives"
            )
        if self.net.training:
            raise ValueError("MldftFunctional takes a network in evaluation mode: call net.eval() first")

    def __call__(self, p: Tensor, sample: Any) -> Tensor:
        """The energy of the coefficients ``p`` (``[n]``) without the nuclei's repulsion, in hartree; a scalar.

        Args:
            p: coefficients, in the sample's own coordinates.
            sample: an ``OFData``, with ``coulomb_matrix`` and ``nuclear_attraction_vector``; it is left as it is.

        Raises:
            ValueError: the network gives slopes of its own, so that it is no energy.
        """
        there = copy.copy(sample)
        there.coeffs = p
        output = self.net(there)
        if not isinstance(output, tuple) or len(output) != 2:
            raise ValueError(
                "the network does not give a pair of an energy and a displacement: one that is not variational has "
                "slopes that are those of no energy, and no minimum to differentiate"
            )
        energy: Tensor = output[0].sum()
        if ANALYTIC[self.target_key]:
            energy = energy + 0.5 * p @ (sample.coulomb_matrix.to(p) @ p) + sample.nuclear_attraction_vector.to(p) @ p
        return energy

    def problem(self, sample: Any) -> Minimum:
        """The density of least energy with the sample's number of electrons, ``solve(problem, guess)``."""
        weight = sample.dual_basis_integrals.to(sample.coeffs)
        electrons = torch.as_tensor(sample.n_electron).to(weight).reshape(())
        return Minimum(partial(self._energy, sample), LinearEquality(weight, electrons), batched=False)

    def _energy(self, sample: Any, p: Tensor) -> Tensor:
        return self(p, sample)


def written_back(checkpoint: Mapping[str, Any], net: nn.Module) -> dict[str, Any]:
    """A Lightning checkpoint of ``mldft`` with the weights of a network that was trained further.

    Args:
        checkpoint: as ``torch.load`` has it; it is left as it is.
        net: whose weights stand under ``net.`` in ``state_dict`` there.

    Raises:
        ValueError: the checkpoint is of another network.
    """
    before = checkpoint.get("state_dict", {})
    after = {f"net.{name}": tensor.detach().clone() for name, tensor in net.state_dict().items()}
    theirs = {name: tensor.shape for name, tensor in before.items() if name.startswith("net.")}
    if theirs != {name: tensor.shape for name, tensor in after.items()}:
        raise ValueError("the checkpoint's weights under 'net.' have other names or shapes than the network's")
    return {**checkpoint, "state_dict": {**before, **after}}
