"""The randomly truncated Neumann series, without bias."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from torchimplicit.gradients.base import SolveTask
from torchimplicit.gradients.linear_estimate import LinearEstimate
from torchimplicit.linear import LinearSolution
from torchimplicit.precision import UnitRows, safe_norm, working_dtype
from torchimplicit.problems.linearization import Linearization
from torchimplicit.solution import Report, Status
from torchimplicit.validation import check_count, check_fraction, check_type

CHECK_EVERY = 16
"""Once every so many terms it is tested whether all further ones are lost in rounding."""


@final
@dataclass(frozen=True, kw_only=True)
class UnbiasedNeumann(LinearEstimate):
    """The Neumann series :math:`\\lambda\\sum_i B^i`, truncated at random ("Russian roulette") such that its mean is
    the exact inverse.

    With :math:`B=\\lambda J+(1-\\lambda)I` and a random number of terms N, term i is divided by the probability
    :math:`s_i=P(N>i)` that it is reached, so that the mean over N is the whole series, :math:`(I-J)^{-1}`. The first
    ``steps`` terms are always taken (:math:`s_i=1`); the j-th term after them is reached with probability
    :math:`p^j` (``survival``), or :math:`(1+j)^{-a}` (``power``).

    The variance is :math:`\\sum_{ij}\\langle t_i,t_j\\rangle(1/s_{\\min(i,j)}-1)` with the terms
    :math:`t_i=\\lambda B^iu`. It is finite where :math:`\\rho(B)^2<p`, and for the power law wherever the series
    converges, :math:`\\rho(B)<1`; the power law needs :math:`a>1` for a finite mean cost, and has rare long runs. The
    mean number of terms is ``steps`` :math:`+\\,p/(1-p)`, or ``steps`` :math:`+\\,\\zeta(a)-1`. The adjoint vector is
    unbiased, and so is every derivative that is linear in it; a loss after an optimizer's nonlinear step is not.

    One number of terms is drawn for the whole batch, since with one per sample all would wait for the longest series,
    at a cost that grows with the batch. So the noise does not average out within a batch, only over steps. A series
    ends early where all further terms together are lost in rounding. Reverse and forward mode, first order.

    In ``solution.adjoint``, ``steps`` is the number of terms, and ``residual`` the size of the last term without its
    weight relative to the first. The status is STEPS_TAKEN for a truncated series, NONFINITE for one that diverged.

    Args:
        steps: the number of terms that are always taken.
        survival: p in (0, 1), the probability with which the series goes on after each further term.
        power: a > 1, for the power law in place of ``survival``.
        damping: :math:`\\lambda` in (0, 1].
        generator: a generator on the CPU; ``None``: PyTorch's global one, so that ``torch.manual_seed`` makes the draws
            reproducible and a checkpoint of the random state resumes them. One number is drawn in every backward pass
            (and in every forward-mode derivative).

    Raises:
        ValueError: a number is out of range, or the generator is not on the CPU.
        TypeError: ``generator`` is not a generator.
    """

    steps: int = 5
    survival: float = 0.8
    power: float | None = None
    damping: float = 1.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_count(self, "steps")
        check_fraction(self, "damping")
        check_type(self, "generator", torch.Generator, optional=True)
        if not 0 < self.survival < 1:
            raise ValueError(
                f"UnbiasedNeumann.survival is {self.survival}, and must lie in (0, 1): at 1 the series never ends"
            )
        if self.power is not None and not 1 < self.power < math.inf:
            raise ValueError(
                f"UnbiasedNeumann.power is {self.power}, and must be above 1: otherwise the mean number of terms is "
                "infinite"
            )
        if self.generator is not None and self.generator.device.type != "cpu":
            raise ValueError(
                f"UnbiasedNeumann.generator is on {self.generator.device}, and must be on the CPU, where the number of "
                "terms is needed: torch.Generator()"
            )

    def reached(self, term: int) -> float:
        """:math:`s_i`, the probability that the term i (from 0) is taken."""
        further = max(0, term - self.steps + 1)
        return float(self.survival**further if self.power is None else (1 + further) ** -self.power)

    def draw(self) -> int:
        """A random number of terms."""
        share = 1 - float(torch.rand((), generator=self.generator, dtype=torch.float64))  # in (0, 1]
        if self.power is None:
            return self.steps + int(math.log(share) / math.log(self.survival))
        return self.steps + int(share ** (-1 / self.power)) - 1

    @torch.no_grad()
    def apply(self, task: SolveTask, tape: Linearization, transposed: bool, b: Tensor) -> LinearSolution:
        operator = task.system.operator(tape, transposed)
        whole = UnitRows.as_they_are(b.to(working_dtype(b.dtype)))
        r = operator.project(whole.unit)
        eps = torch.finfo(b.dtype).eps
        scale, total, terms = safe_norm(r), torch.zeros_like(r), self.draw()
        for term in range(terms):
            if term:
                turned = operator.project(operator.product(r.to(b.dtype)).to(r.dtype))
                r = r - self.damping * turned
            # dividing by the probability of being reached makes each term unbiased (Russian roulette: Chen et al. 2019,
            # Residual flows, theorem 1)
            weight = 1 / self.reached(term)
            total = total + (self.damping * weight) * r
            if term % CHECK_EVERY == CHECK_EVERY - 1 and bool((weight * safe_norm(r) <= 0.01 * eps * scale).all()):
                terms = term + 1
                break
        finite = torch.isfinite(total).all(dim=1) & whole.finite.squeeze(1)
        status = torch.where(finite, int(Status.STEPS_TAKEN), int(Status.NONFINITE))
        relative = (safe_norm(r) / torch.where(scale > 0, scale, 1)).to(b.dtype)
        figures = Report(status, torch.full_like(status, terms), relative, float(terms - 1))
        return LinearSolution(whole.restored(total).to(b.dtype), figures)
