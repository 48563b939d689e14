"""Bracketed roots of one unknown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from torchimplicit.closure import is_transformed
from torchimplicit.problems import Point, System
from torchimplicit.problems.fixed_point import FixedPointSystem
from torchimplicit.problems.root import RootSystem
from torchimplicit.solvers.base import Evaluator, Move, Progress, Solver


class Bracket(NamedTuple):
    """An interval at whose ends the residual has different signs, all ``[batch, 1]``.

    Attributes:
        new, old: its ends, the one that was tried last first.
        last: the end that was replaced last; the three points carry the interpolation.
        new_residual, old_residual, last_residual: the residuals there.
        most: the larger size of the residual at the first two ends.
    """

    new: Tensor
    old: Tensor
    last: Tensor
    new_residual: Tensor
    old_residual: Tensor
    last_residual: Tensor
    most: Tensor

    def narrowed(self, z: Tensor, residual: Tensor) -> Bracket:
        """The bracket after ``z`` between the ends was tried: the end with the same sign gives way."""
        same = residual.sign() == self.new_residual.sign()
        return Bracket(
            z,
            torch.where(same, self.old, self.new),
            torch.where(same, self.new, self.old),
            residual,
            torch.where(same, self.old_residual, self.new_residual),
            torch.where(same, self.new_residual, self.old_residual),
            self.most,
        )


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Chandrupatla(Solver):
    """Chandrupatla's method for a bracketed root of one unknown per sample (Chandrupatla 1997).

    It takes inverse quadratic interpolation where the last three points say that it is safe, and bisection elsewhere:
    about as many evaluations as Brent's method, or fewer. For a :class:`Root` or a :class:`FixedPoint` whose state is
    one number per sample.

    A sample's residual must have different signs at the two bounds, or at a bound and at a start between them, which
    then narrows the bracket from the beginning; infinite values count with their sign. Without a change of sign the
    sample's status is ``Status.BREAKDOWN``, and the point of smallest residual is returned. With NaN at a bound the
    status is ``Status.NONFINITE``. A change of sign may also be a pole: there the residual grows, and the status is
    ``Status.NONFINITE`` too.

    Args:
        low, high: the bounds: numbers, or tensors ``[batch]``. No derivative is taken with respect to them.
        rtol, atol, max_steps, keep_trajectory, keep_trace, check_every, steps, return_last: see
            :class:`Solver`.

    Raises:
        TypeError: a bound is neither a number nor a tensor.
        ValueError: the bounds are not finite, not in order, or do not fit each other.
    """

    low: float | Tensor
    high: float | Tensor
    max_steps: int = 200
    bounded: ClassVar[bool] = True
    not_unrolled: ClassVar[str | None] = "use Implicit"

    def check(self) -> None:
        for name in ("low", "high"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                if is_transformed(value):
                    raise ValueError(f"Chandrupatla.{name} belongs to a torch.func transform: give plain tensors")
                if value.ndim > 1 or not value.is_floating_point():
                    raise ValueError(f"Chandrupatla.{name} must be a number or a floating tensor [batch]")
            elif isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"Chandrupatla.{name} must be a number or a tensor [batch], not {type(value).__name__}")
        low, high = (torch.as_tensor(t, dtype=torch.float64).detach().cpu() for t in (self.low, self.high))
        if low.ndim and high.ndim and low.shape != high.shape:
            raise ValueError(
                f"Chandrupatla.low has shape {tuple(low.shape)}, but high has {tuple(high.shape)}: they must agree"
            )
        if not bool(((low < high) & low.isfinite() & high.isfinite()).all()):
            raise ValueError("Chandrupatla.low must be less than high, and both finite, in every sample")

    def supports(self, system: System) -> None:
        if not isinstance(system, (RootSystem, FixedPointSystem)):
            raise ValueError("Chandrupatla is for a Root or a FixedPoint: for a Minimum take LBFGS or NewtonKrylov")
        if system.leaves is not None and sum(system.leaves.sizes) != 1:
            raise ValueError(
                f"Chandrupatla is for one unknown per sample, but the state has {sum(system.leaves.sizes)}: take "
                "NewtonKrylov, or reshape independent equations to a batch, [batch, 1]"
            )

    def confirms(self, system: System, z: Tensor) -> bool:
        # near a pole, too, a residual is small relative to its terms: the step must exclude that
        return True

    def start(self, point: Point) -> None:
        return None

    def step(self, evaluate: Evaluator, point: Point, state: Bracket | None, progress: Progress) -> Move:
        z, r, lost = point.z, point.residual, None
        if state is None:
            low, high = (self._bound(t, z) for t in (self.low, self.high))
            at_low, at_high = evaluate(low).residual, evaluate(high).residual
            state = Bracket(low, high, low, at_low, at_high, at_low, torch.maximum(at_low.abs(), at_high.abs()))
            inside = (z > low) & (z < high) & ~r.isnan()
            # written as a negation, so that NaN counts as lost
            lost = ~(at_low.sign() * torch.where(inside & (r.sign() != at_low.sign()), r, at_high).sign() <= 0)
            end = torch.where(at_high.isnan() | (at_high.abs() < at_low.abs()), high, low)
        else:
            low, high = torch.minimum(state.new, state.old), torch.maximum(state.new, state.old)
            inside = ~r.isnan()
        narrowed = state.narrowed(z, r)
        state = Bracket(*(torch.where(inside, a, b) for a, b in zip(narrowed, state, strict=True)))
        first, second = state.new_residual, state.old_residual
        width = state.old - state.new
        nearer = torch.where(first.abs() <= second.abs(), state.new, state.old)
        # the finest interval that the dtype can tell apart at the better end
        finest = 2 * torch.finfo(z.dtype).eps * nearer.abs() + torch.finfo(z.dtype).tiny
        share = self._share(state, 0.5 * finest / width.abs())
        to = state.new + share * width
        # an end may be the root itself
        to = torch.where(second == 0, state.old, torch.where(first == 0, state.new, to))
        if lost is not None:  # no change of sign
            to, lost = torch.where(lost, end, to), lost[:, 0]
        done = (width.abs() <= finest)[:, 0]
        # near a pole the residual is small relative to its terms, but larger than at the first bounds
        root = (r.abs() <= state.most)[:, 0]
        solved = torch.zeros_like(root) if progress.solved is None else root & progress.solved
        lost = None if lost is None else lost & ~solved
        active = torch.ones_like(root) if progress.active is None else progress.active
        if bool((solved | ~active).all()):
            return Move(point, state, solved=solved)
        done = done & (first != 0)[:, 0] & (second != 0)[:, 0]
        done = done if lost is None else done & ~lost
        if bool(done.any()):
            # An interval that cannot be narrowed without the tolerance met holds a jump or a pole. A pole is shown to
            # the loop as NaN, so that it counts as non-finite.
            there = evaluate(torch.where(solved[:, None], z, torch.where(done[:, None], nearer, to)))
            pole = done & ~(there.residual.abs() <= state.most)[:, 0]
            shown = there.changed(residual=there.residual.masked_fill(pole[:, None], torch.nan))
            return Move(shown, state, breakdown=(done if lost is None else done | lost) & ~solved, solved=solved)
        return Move(torch.where(solved[:, None], z, to), state, breakdown=lost, solved=solved)

    def fell_short(self, summary: str) -> str:
        return (
            f"Chandrupatla did not converge: {summary}. In a sample that broke down the residual has the same sign at "
            "both bounds, so no root is known to lie between them, or it jumps where it changes its sign: widen "
            "low and high, or take NewtonKrylov, which needs no bounds. The best point is returned"
        )

    @staticmethod
    def _share(state: Bracket, least: Tensor) -> Tensor:
        """Where the next point lies, as a share of the way from the newer end to the older one."""
        a, b, c = state.new, state.old, state.last
        fa, fb, fc = state.new_residual, state.old_residual, state.last_residual
        # Chandrupatla's criterion (xi, phi in his paper): the inverse quadratic through three points is monotonic
        place, height = (a - b) / (c - b), (fa - fb) / (fc - fb)
        safe = (height.square() < place) & ((1 - height).square() < 1 - place)
        share = fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
        share = torch.where(safe & share.isfinite(), share, 0.5)
        return torch.minimum(torch.maximum(share, least), 1 - least).nan_to_num(nan=0.5)

    def _bound(self, value: float | Tensor, like: Tensor) -> Tensor:
        bound = torch.as_tensor(value, dtype=like.dtype, device=like.device).detach()
        if bound.ndim and len(like) % len(bound):
            raise ValueError(f"Chandrupatla's bounds are for {len(bound)} samples, but the batch has {len(like)}")
        # under vmap the batch is a multiple of the bounds' one: its copies lie one after the other
        return bound.repeat(len(like) // len(bound))[:, None] if bound.ndim else bound.expand(len(like), 1)
