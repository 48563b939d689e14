"""A proof that an equilibrium exists, with a bound on the distance of a state from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchimplicit.members import module_of
from torchimplicit.solution import Solution


@dataclass(frozen=True)
class Certificate:
    """A proof that a map contracts, and so has one equilibrium, with a bound on each state's distance from it.

    By Banach's theorem, where a step shrinks distances by the factor q, a state that a step moves by d is at most
    d / (1 - q) from the equilibrium.

    Attributes:
        factor: q < 1, a scalar or ``[batch]``.
        metric: the metric of the contraction: ``"Euclidean"``; or ``"Thompson"``, for positive states alone,
            the largest difference of their logarithms.
        residual: ``[batch]``, the distance that a step of the contraction moves the state, in that metric, with an
            allowance for rounding.
        error: ``[batch]``, an upper bound of the Euclidean distance to the equilibrium.
        monotonicity: for a monotone map, the largest m with
            :math:`\\langle (I-W)d,d\\rangle\\ge m\\lVert d\\rVert^2` for all d; ``None`` for others.
        sensitivity: by how much the equilibrium, or the layer's output where it has one of its own, moves at most for
            each unit that its input does (Euclidean): for a layer its input, for a cell what is added inside the
            activation. ``None`` where nothing is proved.
    """

    factor: Tensor
    metric: str
    residual: Tensor
    error: Tensor
    monotonicity: Tensor | None = None
    sensitivity: Tensor | None = None


def certify(subject: Any, z: Any = None, *inputs: Any) -> Certificate:
    """Certify what the map guarantees by construction, at its present weights and for these inputs.

    The certificate holds for any state, however it was found: bounds are computed from the weights in double precision;
    nothing is estimated from iterates.

    Args:
        subject: a :class:`Solution` of a problem stated by a cell with guarantees; or such a cell, an
            :class:`~torchimplicit.nn.Equilibrium` of one, or a layer with guarantees, together with ``z`` and the
            ``inputs`` that it was called with. They are modules with a method
            ``certificate(z, *inputs) -> Certificate``: those of :mod:`torchimplicit.models` are
            ``MonotoneCell``, ``MonotoneEquilibrium``, ``LipschitzEquilibrium`` and ``PositiveConcaveCell``.

    Raises:
        ValueError: nothing is proved of this map, or not at these weights: the message says why.
    """
    if isinstance(subject, Solution):
        if subject.problem is None:
            raise ValueError(
                "certify needs what was solved, and this solution is cut off from it, as one that an Equilibrium keeps "
                "in its attribute solution: take what layer.solve(x) returns, or call certify(layer, z, x)"
            )
        subject, z, inputs = getattr(subject.problem, "f", subject.problem), subject.value, subject.args
    module = module_of(subject) or subject
    proves = getattr(module, "certificate", None) or getattr(getattr(module, "cell", None), "certificate", None)
    if proves is None:
        raise ValueError(
            f"nothing is proved of {type(module).__name__}: it has no method certificate(z, *inputs), so that it may "
            "have many equilibria, or none. torchimplicit.spectral_radius tells whether plain iteration converges "
            "near one of them, which proves nothing of the others. Cells that have one by construction are "
            "MonotoneCell and PositiveConcaveCell in torchimplicit.models"
        )
    if z is None:
        raise ValueError("certify needs the state and the inputs of the layer: certify(layer, z, x)")
    with torch.no_grad():
        return proves(z, *inputs)


def contraction(factor: Tensor, residual: Tensor, what: str) -> Tensor:
    """``residual / (1 - factor)``, by Banach.

    Raises:
        ValueError: there is no contraction.
    """
    if not bool((factor < 1).all()):
        raise ValueError(
            f"{what} is not proved to contract: the factor is {float(factor.max()):.6g}, and must be below 1 in double "
            "precision. The weights are not finite, or so large that the guaranteed share is lost in rounding"
        )
    return residual / (1 - factor)
