"""The decoder that the settings describe, and how it finds latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchimplicit.gradients import Gradient
from torchimplicit.models import EquilibriumDecoder, conv_decoder, mlp_decoder, multiscale_decoder
from torchimplicit.problems import JointInference
from torchimplicit.recipes.jiio.config import Decoder, Joint
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import Equilibria
from torchimplicit.recipes.runtime.task import gradient, solver
from torchimplicit.solution import Solution
from torchimplicit.solve import solve
from torchimplicit.solvers import Anderson


def make_decoder(config: Decoder, pixels: tuple[int, int, int], equilibria: Equilibria) -> EquilibriumDecoder:
    """The decoder, to images ``[channels, height, width]``."""
    chosen: dict[str, Any] = {"solver": solver(equilibria), "gradient": gradient(equilibria)}
    if config.kind == "mlp":
        return mlp_decoder(pixels, latent=config.latent, width=config.width, bound=config.bound, **chosen)
    chosen |= {"latent": config.latent, "channels": config.channels, "bound": config.bound}
    try:
        if config.kind == "conv":
            return conv_decoder(pixels, **chosen)
        return multiscale_decoder(pixels, scales=config.scales, **chosen)
    except ValueError as error:
        raise UserError(f"--kind {config.kind}: {error}") from None


def squared_error(made: Tensor, wanted: Tensor) -> Tensor:
    """The mean over pixels of each image, ``[batch]``."""
    return (made - wanted).square().flatten(1).mean(dim=1)


def reconstruction(decoder: EquilibriumDecoder, prior: float, step_size: float, pixels: int) -> JointInference:
    """The latent whose image is nearest to a given one.

    Its loss is a sum over pixels, as published: the adjoint is then about as large as the state, and Anderson's method,
    to which both count alike, takes fewer steps than with the mean.

    Args:
        decoder: to images.
        prior, step_size: for a loss that is a mean over pixels.
        pixels: of an image.
    """

    def loss(made: Tensor, x: Tensor, wanted: Tensor) -> Tensor:
        return pixels * (squared_error(made, wanted) + prior * x.square().mean(dim=1))

    return decoder.inference(loss, step_size / pixels)


def joint_solver(joint: Joint, steps: int, keep_trajectory: bool = False) -> Anderson:
    """Of the latents."""
    return Anderson(
        memory=joint.joint_memory,
        regularization=joint.joint_regularization,
        rtol=joint.joint_tolerance,
        max_steps=steps,
        keep_trajectory=keep_trajectory,
    )


def found(
    decoder: EquilibriumDecoder,
    problem: JointInference,
    solver: Anderson,
    *args: Tensor,
    gradient: Gradient | None = None,
) -> Solution:
    """The joint solve from zero for a batch of images, the first of ``args``."""
    return solve(problem, decoder.start(len(args[0])), *args, solver=solver, gradient=gradient, throw=False)


@torch.no_grad()
def latents(decoder: EquilibriumDecoder, joint: Joint, images: Tensor, batch: int = 256) -> Tensor:
    """Of many images, ``[n, latent]``, at test settings."""
    problem = reconstruction(decoder, joint.prior, joint.step_size, images[0].numel())
    chosen = joint_solver(joint, joint.test_steps)
    return torch.cat([found(decoder, problem, chosen, part).value.x for part in images.split(batch)])


@torch.no_grad()
def generated(decoder: EquilibriumDecoder, x: Tensor, batch: int = 256) -> Tensor:
    """The images of latents, each at its exact equilibrium, in [0, 1]."""
    return torch.cat([decoder(part) for part in x.split(batch)]).clamp(0, 1)
