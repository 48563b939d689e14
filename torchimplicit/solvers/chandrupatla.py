"""Roots of one unknown between two bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from torchimplicit.closure import is_transformed
from torchimplicit.errors import UnsupportedDerivativeError
from torchimplicit.problems import Point, System
from torchimplicit.problems.fixed_point import FixedPointSystem
from torchimplicit.problems.root import RootSystem
from torchimplicit.solvers.base import Evaluator, Move, Progress, Solver


class Bracket(NamedTuple):
    """Ends between which the residual changes its sign, the newer one first, and the end before them, with the
    residuals there; and the larger size of the residual at the first two ends; all ``[batch, 1]``."""

    new: Tensor
    old: Tensor
    last: Tensor
    new_residual: Tensor
    old_residual: Tensor
    last_residual: Tensor
    most: Tensor

    def narrowed(self, z: Tensor, residual: Tensor) -> Bracket:
        """Once ``z``, which lies between the ends, has been tried."""
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
    """A bracketed root of one unknown per sample (Chandrupatla 1997): inverse quadratic interpolation where the last
    three points say that it is safe, bisection elsewhere; about as many evaluations as Brent's method, or fewer.

    For a :class:`Root` or a :class:`FixedPoint` whose state is one number per sample. A sample's residual must have
    different signs at the two bounds, or at them and a start between them, which narrows them from the beginning;
    infinite values count with their sign. Without a change of sign a sample is ``Status.BREAKDOWN``, at that of these
    points where its residual is least; with NaN at a bound it is ``Status.NONFINITE``. What is found is a change of
    sign: at a pole the residual grows, and the sample is ``Status.NONFINITE`` too.

    Args:
        low, high: the bounds: numbers, or tensors ``[batch]``; constants as far as derivatives go.
        rtol, atol, max_steps, keep_trajectory, keep_trace, check_every, steps, return_last: see
            :class:`Solver`.
    """

    low: float | Tensor
    high: float | Tensor
    max_steps: int = 200
    bounded: ClassVar[bool] = True

    def check(self) -> None:
        for name in ("low", "high"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                if is_transformed(value):
                    raise ValueError(f"Chandrupatla.{name} belongs to a torch.func transform: give bounds that do not")
                if value.ndim > 1 or not value.is_floating_point():
                    raise ValueError(f"Chandrupatla.{name} must be a number or a floating tensor [batch]")
            elif isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"Chandrupatla.{name} must be a number or a tensor [batch], not {type(value).__name__}")
        low, high = (torch.as_tensor(t, dtype=torch.float64).detach().cpu() for t in (self.low, self.high))
        if low.ndim and high.ndim and low.shape != high.shape:
            raise ValueError(f"Chandrupatla.low has shape {tuple(low.shape)}, and high {tuple(high.shape)}")
        if not bool(((low < high) & low.isfinite() & high.isfinite()).all()):
            raise ValueError("Chandrupatla.low must be less than high, and both finite, in every sample")

    def supports(self, system: System) -> None:
        if not isinstance(system, (RootSystem, FixedPointSystem)):
            raise ValueError("Chandrupatla is for a Root or a FixedPoint: for a Minimum take LBFGS or NewtonKrylov")
        if system.leaves is not None and sum(system.leaves.sizes) != 1:
            raise ValueError(
                f"Chandrupatla is for one unknown per sample, and the state has {sum(system.leaves.sizes)}: take "
                "NewtonKrylov, or reshape independent equations to a batch, [batch, 1]"
            )

    def confirms(self, system: System, z: Tensor) -> bool:
        return True

    def start(self, point: Point) -> None:
        return None

    def step(self, evaluate: Evaluator, point: Point, state: Bracket | None, progress: Progress) -> Move:
        if torch.is_grad_enabled():
            raise UnsupportedDerivativeError("Unrolled cannot differentiate through Chandrupatla: use Implicit")
        z, r, lost = point.z, point.residual, None
        if state is None:
            low, high = (self._bound(t, z) for t in (self.low, self.high))
            one, other = evaluate(low).residual, evaluate(high).residual
            state = Bracket(low, high, low, one, other, one, torch.maximum(one.abs(), other.abs()))
            inside = (z > low) & (z < high) & ~r.isnan()
            lost = ~(one.sign() * torch.where(inside & (r.sign() != one.sign()), r, other).sign() <= 0)
            end = torch.where(other.isnan() | (other.abs() < one.abs()), high, low)
        else:
            low, high = torch.minimum(state.new, state.old), torch.maximum(state.new, state.old)
            inside = ~r.isnan()
        narrowed = state.narrowed(z, r)
        state = Bracket(*(torch.where(inside, a, b) for a, b in zip(narrowed, state, strict=True)))
        first, second = state.new_residual, state.old_residual
        width = state.old - state.new
        nearer = torch.where(first.abs() <= second.abs(), state.new, state.old)
        finest = 2 * torch.finfo(z.dtype).eps * nearer.abs() + torch.finfo(z.dtype).tiny
        share = self._share(state, 0.5 * finest / width.abs())
        to = state.new + share * width
        # an end may be the root itself
        to = torch.where(second == 0, state.old, torch.where(first == 0, state.new, to))
        if lost is not None:  # no change of sign
            to, lost = torch.where(lost, end, to), lost[:, 0]
        done = (width.abs() <= finest)[:, 0]
        # near a pole every residual is small against its terms, and larger than at the bounds
        root = (r.abs() <= state.most)[:, 0]
        solved = torch.zeros_like(root) if progress.solved is None else root & progress.solved
        lost = None if lost is None else lost & ~solved
        active = torch.ones_like(root) if progress.active is None else progress.active
        if bool((solved | ~active).all()):
            return Move(point, state, solved=solved)
        done = done & (first != 0)[:, 0] & (second != 0)[:, 0]
        done = done if lost is None else done & ~lost
        if bool(done.any()):
            there = evaluate(torch.where(solved[:, None], z, torch.where(done[:, None], nearer, to)))
            pole = done & ~(there.residual.abs() <= state.most)[:, 0]
            shown = there.changed(residual=there.residual.masked_fill(pole[:, None], torch.nan))
            return Move(shown, state, breakdown=(done if lost is None else done | lost) & ~solved, solved=solved)
        return Move(torch.where(solved[:, None], z, to), state, breakdown=lost, solved=solved)

    def fell_short(self, summary: str) -> str:
        return (
            f"Chandrupatla did not converge: {summary}. In a sample that broke down the residual has the same sign at "
            "both bounds, so that no root is known to lie between them, or it jumps where it changes its sign: widen "
            "low and high, or take NewtonKrylov, which needs none. The best point is returned"
        )

    @staticmethod
    def _share(state: Bracket, least: Tensor) -> Tensor:
        """How far from the newer end to the older one the next point lies."""
        a, b, c = state.new, state.old, state.last
        fa, fb, fc = state.new_residual, state.old_residual, state.last_residual
        place, height = (a - b) / (c - b), (fa - fb) / (fc - fb)
        safe = (height.square() < place) & ((1 - height).square() < 1 - place)
        share = fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
        share = torch.where(safe & share.isfinite(), share, 0.5)
        return torch.minimum(torch.maximum(share, least), 1 - least).nan_to_num(nan=0.5)

    def _bound(self, value: float | Tensor, like: Tensor) -> Tensor:
        bound = torch.as_tensor(value, dtype=like.dtype, device=like.device).detach()
        if bound.ndim and len(like) % len(bound):
            raise ValueError(f"Chandrupatla's bounds are of {len(bound)} samples, and there are {len(like)}")
        # copies under vmap lie one after the other
        return bound.repeat(len(like) // len(bound))[:, None] if bound.ndim else bound.expand(len(like), 1)
