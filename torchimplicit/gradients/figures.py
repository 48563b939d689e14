"""The figures and warnings of a backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from torchimplicit.closure import is_transformed
from torchimplicit.errors import ConvergenceWarning
from torchimplicit.notices import count_adjoint, notice
from torchimplicit.precision import default_rtol
from torchimplicit.solution import AdjointRecord, Report, Status

NEARLY_SINGULAR = 0.1
"""A warning is given where the condition number times the default tolerance, an estimate of the relative error of the
derivative, exceeds this."""


def report(record: AdjointRecord, figures: Report) -> None:
    """Store the figures of a backward solve for ``solution.adjoint``, and warn if it fell short."""
    record.report = figures
    ill = nearly_singular(figures)
    short = figures.fell_short
    if not bool((short | ill).any()):
        count_adjoint(short.numel(), 0)
        return
    count_adjoint(short.numel(), int(short.sum()))
    if bool(ill.any()):
        assert figures.condition is not None
        notice(
            "the adjoint system is nearly singular",
            f"the adjoint system is nearly singular in {int(ill.sum())} of {ill.numel()} samples (condition at least "
            f"{float(figures.condition[ill].max()):.1g}, see solution.adjoint.condition): the derivative may be wrong "
            "in all its digits, or may not exist, as where two solutions meet. For a minimum DampedImplicit() stays "
            "bounded there",
            ConvergenceWarning,
        )
        if not bool(short.any()):
            return
    saddles = int((figures.status == Status.SADDLE).sum())
    if saddles:
        size = "" if figures.curvature is None else f" of at most {float(figures.curvature.nan_to_num(0.0).min()):.2g}"
        notice(
            "the adjoint system is that of a saddle",
            f"{saddles} of {figures.status.numel()} samples are not at a minimum: the Hessian has a negative "
            f"eigenvalue{size} there (torchimplicit.diagnostics.curvature computes it), and the exact derivative is "
            "that of a saddle. Take DampedImplicit(), which differentiates as if the energy were just convex enough, "
            "or minimize further, or regularize the energy",
            ConvergenceWarning,
        )
    else:
        notice(
            "the adjoint solve did not converge",
            f"the adjoint solve did not converge: {figures.summary()}. The gradient has an error of that size; "
            + _advice(figures.status),
            ConvergenceWarning,
        )


def _advice(status: Tensor) -> str:
    """The advice for an adjoint solve that fell short, by its statuses."""
    advice = {
        Status.MAX_STEPS: "give Implicit(linear_solver=...) more max_steps, a preconditioner, or another method",
        Status.BREAKDOWN: "the method could not go on, and more steps would not help: the system may be singular, or "
        "rounding hides what is left; give Implicit(linear_solver=...) another method (Dense() where the matrix fits "
        "into memory, LSMR() for a singular system), or a preconditioner",
        Status.NONFINITE: "the incoming gradient or the map's derivative holds NaN or infinity in those samples, and "
        "so does what comes out of them",
    }
    return "; ".join(text for reason, text in advice.items() if bool((status == reason).any()))


def nearly_singular(figures: Report) -> Tensor:
    """bool ``[batch]``: where the condition number may amplify the default tolerance to a large error."""
    if figures.condition is None:
        return torch.zeros_like(figures.converged)
    return figures.condition > NEARLY_SINGULAR / default_rtol(figures.condition.dtype)


def truncated(like: Tensor, steps: int, products: float) -> Report:
    """The report of a backward pass that takes a prescribed number of steps, regardless of the residual.

    Args:
        like: ``[batch, dim]``, for its batch, dtype and device.
        steps: the steps of every sample.
        products: the products with the Jacobian.
    """
    count = torch.full(like.shape[:1], steps, dtype=torch.int64, device=like.device)
    unknown = torch.full(like.shape[:1], torch.nan, dtype=like.dtype, device=like.device)
    return Report(torch.full_like(count, int(Status.STEPS_TAKEN)), count, unknown, products)


def reported(z: Tensor, record: AdjointRecord, report: Report) -> Tensor:
    """``z`` with a hook, by which its backward pass stores ``report`` in the record: for estimators that autograd
    differentiates itself.

    Under a ``torch.func`` transform nothing is stored, since its tensors take no hooks.
    """
    if z.requires_grad and not is_transformed(z):

        def leave(_: Tensor) -> None:
            record.report = report

        z.register_hook(leave)
        record.coming = report
    return z
