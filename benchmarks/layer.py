"""The layer that the benchmarks solve, z = tanh(W z + x), its float64 reference, and how work is counted.

The injection x is precomputed, so one evaluation of f is one matrix product and one tanh: the cheapest cell, on which
a solver's own cost shows most.
"""

from __future__ import annotations

import record  # noqa: F401  # isort: skip  (first: it sets the number of threads)

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

torch.set_num_threads(1)

SIZES = ((64, 128), (256, 512), (32, 2048))
VIEWS = frozenset(
    {
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "select",
        "slice",
        "unsqueeze",
        "squeeze",
        "expand",
        "detach",
        "alias",
        "permute",
        "reshape",
        "as_strided",
        "unbind",
        "split",
        "diagonal",
        "view_as_real",
        "lift_fresh",
        "_reshape_alias",
        "unfold",
        "narrow",
        "movedim",
    }
)

SYNCHRONISING = ("_local_scalar_dense", "_linalg_check_errors", "nonzero", "masked_select", "equal")
"""Operations whose result, or whose size, the host waits for."""


def label(batch: int, dim: int) -> str:
    """``64×128``."""
    return f"{batch}×{dim}"


def weight(kind: str, dim: int, seed: int, norm: float = 0.9) -> Tensor:
    """A float64 matrix of spectral norm ``norm``: ``gaussian``, or ``orthogonal`` (all singular values equal)."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    if kind == "orthogonal":
        return norm * torch.linalg.qr(matrix).Q
    return matrix * (norm / torch.linalg.matrix_norm(matrix, 2))


@dataclass
class Layer:
    """One instance of the layer, its loss <cotangent, z>, and the float64 solution and gradients.

    Attributes:
        w, x: float32 leaves that require gradients.
        z0: zeros ``[batch, dim]``.
    """

    batch: int
    dim: int
    kind: str
    seed: int
    w: Tensor = field(init=False)
    x: Tensor = field(init=False)
    z0: Tensor = field(init=False)
    cotangent: Tensor = field(init=False)

    def __post_init__(self) -> None:
        w = weight(self.kind, self.dim, self.seed).float()
        generator = torch.Generator().manual_seed(self.seed + 1)
        x = torch.randn(self.batch, self.dim, generator=generator)
        self.cotangent = torch.randn(self.batch, self.dim, generator=generator)
        self.w, self.x, self.z0 = w.requires_grad_(), x.requires_grad_(), torch.zeros(self.batch, self.dim)

    @functools.cached_property
    def reference(self) -> dict[str, Tensor]:
        """z, and the gradients in x and w, in float64."""
        return _reference(self.w.detach().double(), self.x.detach().double(), self.cotangent.double())

    def f(self, z: Tensor, x: Tensor) -> Tensor:
        """``[rows, dim]``, ``[rows, dim]`` -> ``[rows, dim]``."""
        return torch.tanh(torch.addmm(x, z, self.w.t()))

    def loss(self, z: Tensor) -> Tensor:
        """A scalar whose gradient in z is ``cotangent``."""
        return (z * self.cotangent).sum()

    def gradients(self, z: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the loss in (x, W)."""
        return torch.autograd.grad(self.loss(z), (self.x, self.w))

    def residual(self, z: Tensor) -> float:
        """The largest relative residual of a sample, ``|f(z)-z| / |f(z)|``, computed in float64."""
        z = z.detach().double()
        fz = torch.tanh(z @ self.w.detach().double().t() + self.x.detach().double())
        return float(((fz - z).norm(dim=1) / fz.norm(dim=1)).max())

    def error(self, gradients: tuple[Tensor, ...]) -> float:
        """The larger relative error of the gradients in x and in W against the float64 reference."""
        references = self.reference["x"], self.reference["w"]
        return max(
            float((g.detach().double() - r).norm() / r.norm()) for g, r in zip(gradients, references, strict=True)
        )


def _reference(w: Tensor, x: Tensor, u: Tensor) -> dict[str, Tensor]:
    """The solution and the gradients of <u, z> in float64, by contraction to round-off."""
    z = torch.zeros_like(x)
    for _ in range(1000):
        z, previous = torch.tanh(z @ w.t() + x), z
        if float((z - previous).norm() / z.norm()) < 1e-14:
            break
    slope = 1 - z * z
    g = u.clone()
    for _ in range(1000):
        g, previous = (g * slope) @ w + u, g
        if float((g - previous).norm() / g.norm()) < 1e-14:
            break
    inner = g * slope
    return {"z": z, "x": inner, "w": inner.t() @ z}


@dataclass(frozen=True)
class Work:
    """What a call did: evaluations of f and products with its Jacobian (in whole-batch equivalents, so that a solver
    that leaves converged rows out is credited), dispatched tensor operations, those that are no mere views, and reads
    of a tensor's value by the host (each a synchronisation on a GPU)."""

    evaluations: float
    products: float
    operations: int
    kernels: int
    host_reads: int


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        if name in ("tanh", "tanh_backward"):
            self.rows[name] += out.numel()
        return out


@contextlib.contextmanager
def _reads() -> Iterator[Counter[str]]:
    """Counts the reads that no dispatched operation shows, by wrapping the methods of ``Tensor`` that make them."""
    found: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        method = getattr(Tensor, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            return method(*args, **kwargs)

        return wrapper

    with mock.patch.multiple(Tensor, **{name: counted(name) for name in ("tolist", "numpy")}):
        yield found


def count(call: Callable[[], Any], numel: int) -> Work:
    """Run ``call`` once and count its work; ``numel`` is the size of the whole batch's state."""
    with _reads() as reads, _Counting() as mode:
        call()
    kernels = sum(n for name, n in mode.calls.items() if name not in VIEWS)
    return Work(
        mode.rows["tanh"] / numel,
        mode.rows["tanh_backward"] / numel,
        mode.calls.total(),
        kernels,
        reads.total() + sum(mode.calls[name] for name in SYNCHRONISING),
    )
