"""The documented rule of convergence, evaluated on the whole problem in float64 at the point that was returned."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import grad, jacrev

from tests.truth import cores
from tests.truth.case import Case
from tests.truth.data import Data
from tests.truth.statement import Statement

SLACK = 3
"""The factor by which the size of the terms may be taken too large."""


def broken(case: Case, data: Data, value: Tensor) -> str:
    """What does not hold, in words; nothing where the claim is confirmed.

    Of a fixed point: ``|f(z) - z| <= rtol |f(z)| + atol``, sample by sample, where rounding is allowed for. Of a root
    or a minimum: ``|r| <= rtol |A| |z|``, within ``SLACK``, for what stands on the right is measured, not known.
    """
    if case.of == "leaf" or case.kind == "joint" or case.constraint or case.metric:
        return ""
    nested = cores.inner if case.style == "nested" else None
    of = case.activation, case.coupling, nested
    z = value.double()
    eps, rtol = torch.finfo(value.dtype).eps, Statement(case, data).forward_tolerance
    if case.kind == "fixed_point":
        image = cores.image(z, data.tensors, *of)
        if not case.batched:
            z, image = z.reshape(1, -1), image.reshape(1, -1)
        scale, off = image.norm(dim=1), (image - z).norm(dim=1)
        allowed = rtol * scale + 50 * eps * (scale + 1)
    else:

        def residual(z: Tensor) -> Tensor:
            if case.kind == "root":
                return cores.root(z, data.tensors, *of)
            return grad(lambda z: cores.energy(z, data.tensors, *of).sum())(z)

        rows = case.batch if case.batched else 1
        matrix = jacrev(residual)(z).reshape(rows, -1, z.numel())
        size = z.reshape(rows, -1).norm(dim=1).max() if case.coupling else z.reshape(rows, -1).norm(dim=1)
        scale = torch.linalg.matrix_norm(matrix, 2) * size
        off = residual(z).reshape(rows, -1).norm(dim=1)
        allowed = SLACK * rtol * scale + 50 * eps * (scale + 1)
    if bool((off <= allowed).all()):
        return ""
    return f"the residual is {float((off / scale).max()):.1e} of its terms' size"
