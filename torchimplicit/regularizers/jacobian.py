"""The Frobenius norm of the Jacobian, by random projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchimplicit.compiler import untraced
from torchimplicit.inference import outside_inference_mode
from torchimplicit.problems import JointInference, LeastSquares, Minimum, Problem
from torchimplicit.problems.system import vjp
from torchimplicit.state import Layout
from torchimplicit.validation import at_least


@untraced()
@outside_inference_mode
def jacobian_frobenius(
    problem: Problem, z: Any, *args: Any, samples: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Hutchinson's estimate of :math:`\\lVert J\\rVert_F^2 / \\dim`, averaged over the batch (Bai et al. 2021).

    :math:`J=\\partial f/\\partial z`; the estimate is the mean of :math:`\\lVert v^TJ\\rVert^2/\\mathrm{numel}` over
    ``samples`` Gaussian vectors v. It is differentiable in the arguments and parameters of ``f``, and in ``z``: give
    the solution's value for the exact derivative, or detach it for the usual cheaper term.

    Args:
        problem: a :class:`FixedPoint` or a :class:`Root`.
        z: the state, as for :func:`solve`.
        args: as for :func:`solve`.
        samples: the number of random vectors.
        generator: on the state's device; ``None``: the global one.

    Returns:
        a scalar.

    Raises:
        TypeError: the problem is not a :class:`FixedPoint` or a :class:`Root`.
        ValueError: ``samples`` is below 1.
    """
    if isinstance(problem, (Minimum, LeastSquares)):
        raise TypeError("jacobian_frobenius needs a map, but a minimum has an energy: give FixedPoint or Root")
    if isinstance(problem, JointInference):
        raise TypeError(
            "jacobian_frobenius needs a map, but that of JointInference is for its state z only: call "
            "jacobian_frobenius(FixedPoint(f), state.z, state.x, *args), with x as an argument of the map"
        )
    at_least("jacobian_frobenius", "samples", samples, 1)
    layout = Layout.of(z, problem.batched)
    flat = layout.flatten(z, "z")

    def image(flat: Tensor) -> Tensor:
        return problem.flat_output(layout, problem.function(layout.unflatten(flat), *args), flat.shape[0], cast=True)

    out, pull = vjp(image, flat)
    total = flat.new_zeros(())
    for _ in range(samples):
        v = torch.randn(out.shape, generator=generator, dtype=out.dtype, device=out.device)
        total = total + pull(v)[0].square().sum()
    return total / (samples * flat.numel())
