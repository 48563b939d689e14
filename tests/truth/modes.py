"""The ways of differentiating, each the same for the library's solution and for the reference's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from tests.truth.cores import Tensors
from tests.truth.data import Data
from tests.truth.styles import PASSED

Solve = Callable[[Tensors], Tensor]
Mode = Callable[[Solve, Tensors, Data], list[Tensor]]
SHARED = "b"
"""The tensor that Jacobians, Hessians and vmap are over."""


def loss_of(z: Tensor, data: Data) -> Tensor:
    """A loss with curvature, scaled to the case's cotangent."""
    return data.case.cotangent * ((data.cotangent.to(z.dtype) * z).sum() + 0.5 * z.square().sum())


def differentiated(mode: str, solve: Solve, tensors: Tensors, data: Data) -> list[Tensor]:
    """Derivatives of the solution, or of a loss of it, in units of the cotangent; the solve's value for ``vmap``."""
    return [t.detach().double() / data.case.cotangent for t in _MODES[mode](solve, tensors, data)]


def leaves_of(tensors: Tensors) -> Tensors:
    """Trainable copies: parameters, but for what carries the batch."""
    copies = {name: t.detach().clone(memory_format=torch.preserve_format) for name, t in tensors.items()}
    return {name: t.requires_grad_() if name in PASSED else nn.Parameter(t) for name, t in copies.items()}


def _directions(tensors: Tensors, data: Data) -> list[Tensor]:
    return [data.directions[name].to(t.dtype) for name, t in tensors.items()]


def _grads(of: Tensor, tensors: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    found = torch.autograd.grad(of, tensors, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)]


def _backward(solve: Solve, tensors: Tensors, data: Data) -> list[Tensor]:
    leaves = leaves_of(tensors)
    return _grads(loss_of(solve(leaves), data), tuple(leaves.values()))


def _double(solve: Solve, tensors: Tensors, data: Data) -> list[Tensor]:
    leaves = leaves_of(tensors)
    grads = _grads(loss_of(solve(leaves), data), tuple(leaves.values()), create_graph=True)
    along = sum(((g * d).sum() for g, d in zip(grads, _directions(tensors, data), strict=True)), torch.zeros(()))
    return [*grads, *_grads(along, tuple(leaves.values()))]


def _func_grad(solve: Solve, tensors: Tensors, data: Data) -> list[Tensor]:
    return list(torch.func.grad(lambda t: loss_of(solve(t), data))(tensors).values())


def _jvp(solve: Solve, tensors: Tensors, data: Data) -> list[Tensor]:
    directions = dict(zip(tensors, _directions(tensors, data), strict=True))
    return [data.case.cotangent * torch.func.jvp(solve, (tensors,), (directions,))[1]]


def _dual(solve: Solve, tensors: Tensors, data: Data) -> list[Tensor]:
    with forward_ad.dual_level():
        pairs = zip(tensors.items(), _directions(tensors, data), strict=True)
        tangent = forward_ad.unpack_dual(solve({name: forward_ad.make_dual(t, d) for (name, t), d in pairs})).tangent
    return [data.case.cotangent * tangent]


def of_shared(solve: Solve, tensors: Tensors) -> Callable[[Tensor], Tensor]:
    """The solution as a function of the shared tensor."""
    return lambda t: solve({**tensors, SHARED: t})


def several(tensors: Tensors, data: Data) -> Tensor:
    """Copies of the shared tensor that are a little different, stacked."""
    t, d = tensors[SHARED], data.directions[SHARED].to(tensors[SHARED].dtype)
    return torch.stack((t, t + 0.01 * d, t - 0.01 * d))


def _vmap(solve: Solve, tensors: Tensors, data: Data) -> list[Tensor]:
    return [data.case.cotangent * torch.func.vmap(of_shared(solve, tensors))(several(tensors, data))]


def _vmap_grad(solve: Solve, tensors: Tensors, data: Data) -> list[Tensor]:
    of = of_shared(solve, tensors)
    return [torch.func.vmap(torch.func.grad(lambda t: loss_of(of(t), data)))(several(tensors, data))]


def _jacrev(solve: Solve, tensors: Tensors, data: Data) -> list[Tensor]:
    return [data.case.cotangent * torch.func.jacrev(of_shared(solve, tensors))(tensors[SHARED])]


def _jacfwd(solve: Solve, tensors: Tensors, data: Data) -> list[Tensor]:
    return [data.case.cotangent * torch.func.jacfwd(of_shared(solve, tensors))(tensors[SHARED])]


def _hessian(solve: Solve, tensors: Tensors, data: Data) -> list[Tensor]:
    of = of_shared(solve, tensors)
    return [torch.func.hessian(lambda t: loss_of(of(t), data))(tensors[SHARED])]


_MODES: dict[str, Mode] = {
    "backward": _backward,
    "double": _double,
    "func-grad": _func_grad,
    "jvp": _jvp,
    "dual": _dual,
    "vmap": _vmap,
    "vmap-grad": _vmap_grad,
    "jacrev": _jacrev,
    "jacfwd": _jacfwd,
    "hessian": _hessian,
}
