"""An equilibrium as a reconstructor of deepinv, beside deepinv's own DEQ with the same denoiser and operator.

Both find the point that proximal gradient descent with a denoiser in place of the proximal operator leaves unchanged,
``x = D(x - A^T(Ax - y))``, to the same relative tolerance, and differentiate a loss of it in the denoiser's weights.
Values, gradients and a Hessian-vector product in the measurements are compared with tight solves in float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import deepinv
import torch
from deepinv.optim.data_fidelity import L2
from deepinv.optim.optimizers import PGD, DEQConfig
from deepinv.optim.prior import PnP
from torch import Tensor, nn

import torchimplicit as ti


class Denoiser(nn.Module):
    """A small one that contracts with the constant 0.95, so that there is one equilibrium."""

    def __init__(self) -> None:
        super().__init__()
        first, second, last = (nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise((1, 16, 16, 1)))
        self.body = nn.Sequential(first, nn.ELU(), second, nn.ELU(), last)
        ti.nn.apply_norm(self.body, ti.nn.spectral_norm, bound=1 / 3)

    def forward(self, x: Tensor, sigma: Any = None) -> Tensor:
        return 0.55 * x + 0.4 * self.body(x)


class Reconstructor(nn.Module):
    """What deepinv calls a reconstructor: ``model(y, physics)``, for any operator with ``A`` and ``A_adjoint``."""

    def __init__(self, denoiser: nn.Module, **strategies: Any):
        super().__init__()
        self.denoiser, self.strategies = denoiser, strategies

    def forward(self, y: Tensor, physics: Any) -> Tensor:
        def step(x: Tensor, y: Tensor) -> Tensor:
            return self.denoiser(x - physics.A_adjoint(physics.A(x) - y))

        return ti.solve(ti.FixedPoint(step, rowwise=True), physics.A_adjoint(y), y, **self.strategies).value


def ours(denoiser: nn.Module, tolerance: float) -> Reconstructor:
    """The same map, by Anderson's method and GMRES."""
    gradient = ti.Implicit(linear_solver=ti.GMRES(rtol=tolerance, max_steps=500))
    return Reconstructor(denoiser, solver=ti.Anderson(rtol=tolerance, max_steps=500), gradient=gradient)


def theirs(denoiser: nn.Module, tolerance: float) -> nn.Module:
    """deepinv's, by plain iteration forward and backward, its default."""
    stop: dict[str, Any] = {"crit_conv": "residual", "thres_conv": tolerance, "early_stop": True, "max_iter": 500}
    backward = DEQConfig(max_iter_backward=500)
    return PGD(data_fidelity=L2(), prior=PnP(denoiser), stepsize=1.0, g_param=0.05, DEQ=backward, **stop)


def off(a: Tensor, b: Tensor) -> float:
    """The relative distance."""
    return float((a - b).norm() / b.norm())


def compare(dtype: torch.dtype, tolerance: float, size: int, repeats: int = 7) -> None:
    """Print what both find, and the CPU time of a forward and backward pass, taken in turn."""
    torch.manual_seed(0)
    denoiser = Denoiser().double().eval()
    mask, wanted = (torch.rand(1, size, size) < 0.5).double(), torch.rand(4, 1, size, size, dtype=torch.float64)
    operator = deepinv.physics.Inpainting(img_size=(1, size, size), mask=mask)
    measured = operator(wanted)
    direction = torch.randn_like(measured)

    def run(model: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        denoiser.zero_grad()
        value = model(measured, operator)
        (value - wanted).square().sum().backward()
        return value.detach(), torch.cat([p.grad.flatten() for p in denoiser.parameters()])

    def product(model: Callable[..., Tensor]) -> Tensor:
        y = measured.clone().requires_grad_()
        (slope,) = torch.autograd.grad((model(y, operator) ** 3).sum(), y, create_graph=True)
        return torch.autograd.grad(slope, y, direction)[0]

    tight = ours(denoiser, 1e-13)
    value, gradient, second = *run(tight), product(tight)
    denoiser, operator = denoiser.to(dtype), operator.to(dtype)
    wanted, measured, direction = (t.to(dtype) for t in (wanted, measured, direction))
    models = {"torchimplicit": ours(denoiser, tolerance), "deepinv": theirs(denoiser, tolerance)}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            start = time.process_time()
            run(model)
            seconds[name].append(time.process_time() - start)
    for name, model in models.items():
        errors = [off(part.double(), right) for part, right in zip(run(model), (value, gradient), strict=True)]
        try:
            twice = f"{off(product(model).double(), second):.0e}"
        except RuntimeError as error:
            twice = f"refused ({str(error).split('.')[0]})"
        print(
            f"{dtype}, tolerance {tolerance:g}, {size}x{size}: {name:13s} value {errors[0]:.0e}, "
            f"gradient {errors[1]:.0e}, Hessian-vector product {twice}; {1e3 * median(seconds[name]):.0f} ms"
        )
    print(f"  {median(seconds['deepinv']) / median(seconds['torchimplicit']):.1f} times deepinv's time over ours")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"deepinv {deepinv.__version__}, torch {torch.__version__}")
    compare(torch.float64, 1e-10, 32)
    compare(torch.float32, 1e-4, 32)
    compare(torch.float32, 1e-4, 64)
