"""A plug-and-play restoration as an equilibrium, and the same trained end to end.

A blurred, noisy photograph is restored at the point where a gradient step on the data term, followed by a
denoiser, changes nothing: `z = D(z - η Aᵀ(A z - y))`. Used as it comes, the denoiser knows noise only. Trained
through the equilibrium (Gilton, Ongie and Willett 2021) it learns this operator, at the memory of one step. Any
operator with `A` and `A_adjoint` will do: those of deepinv have both. Two photographs of scikit-learn: one is
trained on, and the other restored.
"""

import sys

import torch
from sklearn.datasets import load_sample_image
from torch import nn

import torchimplicit as ti


class Blur:
    """A Gaussian blur with reflecting edges, and noise; named as deepinv names its operators."""

    def __init__(self, width: float, noise: float):
        self.noise, place = noise, torch.arange(-4.0, 5.0)
        line = torch.exp(-(place**2) / (2 * width**2))
        self.kernel = (line[:, None] * line / line.sum() ** 2)[None, None]

    def A(self, z: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(nn.functional.pad(z, (4, 4, 4, 4), mode="circular"), self.kernel)

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return self.A(y)  # the kernel is symmetric

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        return self.A(z) + self.noise * torch.randn_like(z)


class Denoiser(nn.Module):
    """`z` less the noise that a small convolutional network finds in it, as DnCNN does."""

    def __init__(self, channels: int = 16):
        super().__init__()
        sizes = (1, channels, channels, channels, 1)
        layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in zip(sizes, sizes[1:], strict=False)]
        # the equilibrium is unique where the noise that is found does not grow with the picture
        layers = [ti.nn.spectral_norm(layer, bound=1.0, only_above=True) for layer in layers]
        self.found = nn.Sequential(layers[0], nn.ELU(), layers[1], nn.ELU(), layers[2], nn.ELU(), layers[3])

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z - self.found(z)


class Restoration(nn.Module):
    """The map whose equilibrium is the restored picture."""

    def __init__(self, denoiser: nn.Module, physics: Blur, step_size: float = 1.0):
        super().__init__()
        self.denoiser, self.physics, self.step_size = denoiser, physics, step_size

    def forward(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.denoiser(z - self.step_size * self.physics.A_adjoint(self.physics.A(z) - y))


def grey(name: str) -> torch.Tensor:
    return torch.tensor(load_sample_image(name).mean(2) / 255, dtype=torch.float32)[None, None]


def patches(picture: torch.Tensor, count: int, size: int = 24) -> torch.Tensor:
    rows = torch.randint(picture.shape[2] - size, (count, 2))
    return torch.cat([picture[:, :, r : r + size, c : c + size] for r, c in rows.tolist()])


def psnr(z: torch.Tensor, picture: torch.Tensor) -> float:
    return -10 * torch.log10((z - picture).square().mean()).item()


torch.manual_seed(0)
train, held_out = grey("flower.jpg"), grey("china.jpg")[:, :, 100:196, 200:296]
physics, denoiser = Blur(width=1.5, noise=0.01), Denoiser()
solver, gradient = ti.Anderson(rtol=1e-3, max_steps=30), ti.UnrolledPhantom(steps=8)
layer = ti.nn.Equilibrium(Restoration(denoiser, physics), solver=solver, gradient=gradient, rowwise=True)
blurred = physics(held_out)
shown = {"blurred": blurred}


def train_by(steps: int, rate: float, restore, degrade) -> None:
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=rate)
    for _ in range(steps):
        picture = patches(train, 8)
        loss = (restore(degrade(picture)) - picture).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def show(name: str) -> None:
    with torch.no_grad():
        shown[name] = layer(blurred, z0=blurred)
    print(f"{name:14s} {psnr(shown[name], held_out):.2f} dB; {layer.solution.summary()}")


print(f"{'blurred':14s} {psnr(blurred, held_out):.2f} dB")
train_by(200, 3e-3, denoiser, lambda picture: picture + 0.01 * torch.randn_like(picture))
show("plug and play")
train_by(60, 3e-3, lambda y: layer(y, z0=y), physics)
show("end to end")

if len(sys.argv) > 1:  # the picture
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(11, 3), layout="constrained")
    for axis, (name, picture) in zip(axes, (shown | {"the photograph": held_out}).items(), strict=True):
        axis.imshow(picture[0, 0], cmap="gray", vmin=0, vmax=1)
        axis.set(title=f"{name}, {psnr(picture, held_out):.1f} dB" if picture is not held_out else name)
        axis.axis("off")
    figure.savefig(sys.argv[1], dpi=120)
