"""Decoders: bounded maps, and latents found by joint inference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torchimplicit as ti
from torchimplicit.models import (
    EquilibriumDecoder,
    MultiscaleDecoderCell,
    conv_decoder,
    mlp_decoder,
    multiscale_decoder,
)
from torchimplicit.nn import per_solve, spectral_norm


def loss(made: Tensor, x: Tensor, wanted: Tensor) -> Tensor:
    return (made - wanted).square().flatten(1).mean(dim=1) + 0.01 * x.square().mean(dim=1)


def length(one: list[Tensor], other: list[Tensor]) -> float:
    """Of the difference."""
    return float(torch.stack([(p - q).square().sum() for p, q in zip(one, other, strict=True)]).sum().sqrt())


def make(kind: str) -> EquilibriumDecoder:
    torch.manual_seed(0)
    tight = {"solver": ti.Anderson(rtol=1e-11, max_steps=300), "gradient": ti.Implicit()}
    if kind == "mlp":
        return mlp_decoder((1, 3, 4), latent=3, width=8, **tight).double().eval()  # type: ignore[arg-type]
    if kind == "conv":
        return conv_decoder((2, 4, 4), latent=3, channels=4, **tight).double().eval()  # type: ignore[arg-type]
    return multiscale_decoder((2, 8, 8), latent=3, channels=2, scales=3, **tight).double().eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["mlp", "conv", "mdeq"])
class TestAll:
    def test_contracts_whatever_the_weights(self, kind: str) -> None:
        decoder = make(kind)
        cell = decoder.equilibrium.cell
        with torch.no_grad():
            for parameter in cell.parameters():
                parameter.mul_(30)
        cell.train()
        z, x = decoder.start(5)
        for _ in range(20):  # the power method
            cell(z, x)
        cell.eval()
        several = [z] if isinstance(z, Tensor) else z
        a, b = ([torch.randn_like(part) for part in several] for _ in range(2))
        with torch.no_grad():
            ends = [cell(s[0] if isinstance(z, Tensor) else s, x) for s in (a, b)]
        one, other = ([end] if isinstance(z, Tensor) else end for end in ends)
        assert length(one, other) < 0.61 * length(a, b)

    def test_latents_and_the_envelope_gradient(self, kind: str) -> None:
        decoder = make(kind)
        with torch.no_grad():
            wanted = decoder(torch.randn(4, 3, dtype=torch.float64))
        solver = ti.Anderson(memory=20, rtol=1e-9, max_steps=3000)

        def least(gradient: ti.gradients.Gradient) -> tuple[Tensor, ti.Solution]:
            problem = decoder.inference(loss, 1.0)
            solution = ti.solve(problem, decoder.start(4), wanted, solver=solver, gradient=gradient)
            return problem.loss(solution.value.z, solution.value.x, wanted).mean(), solution

        value, solution = least(ti.Envelope())
        assert bool(solution.converged.all())
        x = solution.value.x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(decoder(x), x, wanted).sum(), x)
        assert float(slope.norm()) < 1e-6
        parameters = [p for p in decoder.parameters() if p.requires_grad]
        cheap = torch.autograd.grad(value, parameters)
        held = torch.autograd.grad(loss(decoder(x.detach()), x.detach(), wanted).mean(), parameters)
        for one, other in zip(cheap, held, strict=True):
            assert torch.allclose(one, other, atol=1e-7)


def test_weights_computed_once_have_their_gradient() -> None:
    torch.manual_seed(0)
    cell = spectral_norm(torch.nn.Linear(4, 4).double(), bound=0.5).eval()
    x = torch.randn(2, 4, dtype=torch.float64)
    function = per_solve(cell)
    once = torch.autograd.grad(function(function(x)).sum(), list(cell.parameters()))
    usual = torch.autograd.grad(cell(cell(x)).sum(), list(cell.parameters()))
    for one, other in zip(once, usual, strict=True):
        assert torch.allclose(one, other)
    plain = torch.nn.Linear(2, 2)
    assert per_solve(plain) is plain


@pytest.mark.parametrize("pixels", [(1, 28, 20), (3, 7, 5), (1, 8, 8)])
def test_images_of_any_shape(pixels: tuple[int, int, int]) -> None:
    x = torch.randn(2, 3)
    for make in (conv_decoder, multiscale_decoder, mlp_decoder):
        decoder = make(pixels, latent=3)  # type: ignore[operator]
        assert decoder(x).shape == (2, *pixels)
        problem = decoder.inference(lambda made, x, wanted: (made - wanted).square().flatten(1).sum(1), 0.1)
        found = ti.solve(problem, decoder.start(2), decoder(x).detach(), solver=ti.Anderson(max_steps=3), throw=False)
        assert found.value.x.shape == (2, 3)
    with pytest.raises(ValueError, match="latent is 0"):
        mlp_decoder(pixels, latent=0)


def test_every_scale_sees_all_others() -> None:
    decoder = multiscale_decoder((1, 16, 16), latent=3, channels=2, scales=3).double()
    cell = decoder.equilibrium.cell
    z, x = decoder.start(1)
    assert [tuple(part.shape) for part in z] == [(1, 2, 8, 8), (1, 2, 4, 4), (1, 2, 2, 2)]
    z = [part.requires_grad_() for part in z]
    for made in cell(z, x):
        assert all(bool((slope != 0).any()) for slope in torch.autograd.grad(made.sum(), z, retain_graph=True))
    assert decoder(torch.randn(2, 3, dtype=torch.float64)).shape == (2, 1, 16, 16)


def test_sizes_that_cannot_be_halved_so_often() -> None:
    with pytest.raises(ValueError, match="not divisible by 4"):
        MultiscaleDecoderCell(3, 2, (8, 6), scales=3)
