"""The documented rule of convergence, evaluated on the whole problem in float64 at the point that was returned."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.truth import cores
from tests.truth.case import Case
from tests.truth.data import Data
from tests.truth.statement import Statement


def broken(case: Case, data: Data, value: Tensor) -> str:
    """What does not hold, in words; nothing where the claim is confirmed.

    Of a fixed point: ``|f(z) - z| <= rtol |f(z)| + atol``, sample by sample, where rounding is allowed for.
    """
    if case.kind != "fixed_point" or case.of == "leaf":
        return ""
    nested = cores.inner if case.style == "nested" else None
    z = value.double()
    image = cores.image(z, data.tensors, case.activation, case.coupling, nested)
    if not case.batched:
        z, image = z.reshape(1, -1), image.reshape(1, -1)
    eps = torch.finfo(value.dtype).eps
    scale = image.norm(dim=1)
    allowed = Statement(case, data).forward_tolerance * scale + 50 * eps * (scale + 1)
    off = (image - z).norm(dim=1)
    if bool((off <= allowed).all()):
        return ""
    return f"the residual is {float((off / scale).max()):.1e} of the map's size"
