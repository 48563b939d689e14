"""A plug-and-play restoration as an equilibrium, and the same trained end to end.

A photograph with lost pixels is restored at the point that a gradient step on the data term, followed by a
denoiser, leaves unchanged: `z = D(z - Aᵀ(A z - y))`. The pre-trained denoiser knows only noise. Trained
through the equilibrium (Gilton, Ongie and Willett 2021) it also learns the operator, any with `A` and
`A_adjoint` as in deepinv. One half of a photograph is for training, the other is restored.
"""

import sys
from itertools import pairwise

import torch
from sklearn.datasets import load_sample_image
from torch import nn

import torchimplicit as ti

SIZE = 48


class Mask:
    """Two pixels of three are lost, the others noisy; named as deepinv names its operators."""

    def __init__(self, size: int):
        self.kept = (torch.rand(size, size) < 1 / 3).float()

    def A(self, z: torch.Tensor) -> torch.Tensor:
        return self.kept * z

    A_adjoint = A

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        return self.A(z + 0.02 * torch.randn_like(z))


class Restoration(nn.Module):
    """The map whose equilibrium is the restored picture; its denoiser takes away what a small network finds."""

    def __init__(self, physics: Mask):
        super().__init__()
        first, second, third, last = (nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise((1, 16, 16, 16, 1)))
        self.noise = nn.Sequential(first, nn.ELU(), second, nn.ELU(), third, nn.ELU(), last)
        # the equilibrium is unique where the noise that is found does not grow with the picture
        ti.nn.apply_norm(self.noise, ti.nn.spectral_norm, only_above=True)
        self.physics = physics

    def denoise(self, z: torch.Tensor) -> torch.Tensor:
        return z - self.noise(z)

    def forward(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.denoise(z - self.physics.A_adjoint(self.physics.A(z) - y))


def patches(picture: torch.Tensor, count: int) -> torch.Tensor:
    corners = torch.randint(min(picture.shape[2:]) - SIZE, (count, 2))
    return torch.cat([picture[:, :, r : r + SIZE, c : c + SIZE] for r, c in corners.tolist()])


def train_by(steps: int, rate: float, restore, degrade) -> None:
    optimizer = torch.optim.Adam(cell.parameters(), lr=rate)
    for _ in range(steps):
        picture = patches(china[:, :, :, 320:], 4)
        loss = (restore(degrade(picture)) - picture).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


torch.manual_seed(0)
china = torch.tensor(load_sample_image("china.jpg").mean(2) / 255, dtype=torch.float32)[None, None]
physics = Mask(SIZE)
cell = Restoration(physics)
strategies = {"solver": ti.Anderson(steps=25), "gradient": ti.UnrolledPhantom(steps=8)}  # in training
layer = ti.nn.Equilibrium(cell, eval_solver=ti.Anderson(rtol=1e-3), **strategies)
held_out = patches(china[:, :, :, :320], 16)
shown = {"damaged": (damaged := physics(held_out))}


def show(name: str) -> None:
    layer.eval()
    with torch.no_grad():
        shown[name] = layer(damaged, z0=damaged)
    layer.train()
    error = (shown[name] - held_out).square().mean((1, 2, 3))
    print(f"{name:14s} {-10 * error.log10().mean():.2f} dB; {layer.solution.summary()}")


train_by(300, 3e-3, cell.denoise, lambda picture: picture + 0.05 * torch.randn_like(picture))
show("plug and play")
train_by(150, 1e-3, lambda y: layer(y, z0=y), physics)
show("end to end")

if len(sys.argv) > 1:  # the picture
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(11, 3), layout="constrained")
    for axis, (name, picture) in zip(axes, (shown | {"the photograph": held_out}).items(), strict=True):
        axis.imshow(picture[held_out.var((1, 2, 3)).argmax(), 0], cmap="gray", vmin=0, vmax=1)
        axis.set(title=name, xticks=[], yticks=[])
    figure.savefig(sys.argv[1], dpi=120)
