"""Compositing by gradients: a region of one picture pasted into another through a field's exact derivatives.

Copied pixels leave a seam; copied gradients do not (Pérez, Gangnet and Blake 2003). The composite is a function of
the coordinates whose values outside of the region are those of the one picture, and whose gradient inside is that
of the other. Training it differentiates the gradient again: `ImplicitSIREN` gives exact mixed second derivatives
of its equilibrium, and its explicit counterpart `SIREN` ordinary ones. Poisson's equation on the grid is the reference.
"""

import sys

import torch
from sklearn.datasets import load_sample_image
from torch.nn.functional import grid_sample, interpolate

import torchimplicit as ti
from torchimplicit.models import SIREN, ImplicitSIREN

SIZE, STEP = 40, 2 / 39


def picture(name: str, top: int, left: int, side: int) -> torch.Tensor:
    pixels = torch.tensor(load_sample_image(name).mean(2) / 255, dtype=torch.float32)
    pixels = pixels[None, None, top : top + side, left : left + side]
    return interpolate(pixels, (SIZE, SIZE), mode="area")[0, 0]


def slopes(values: torch.Tensor) -> torch.Tensor:
    """The gradient on the grid, down and right, `[SIZE, SIZE, 2]`."""
    return torch.stack(torch.gradient(values, spacing=STEP), dim=-1)


def misfit(composite: torch.Tensor) -> torch.Tensor:
    """Poisson's energy: differences between neighbours, one of which is inside, are to be those of the source."""
    error = torch.where(inside, composite, target) - source
    both = [(error.diff(dim=d), inside | inside.roll(-1, d)) for d in (0, 1)]
    return sum(0.5 * torch.where(near.narrow(d, 0, SIZE - 1), e, 0).square().sum() for d, (e, near) in enumerate(both))


def gradient(field: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The field's exact gradient at the points, differentiable in the weights."""
    x = x.requires_grad_()
    return torch.autograd.grad(field(x).sum(), x, create_graph=True)[0]


torch.manual_seed(0)
target, source = picture("china.jpg", 200, 300, 227), 0.4 * picture("flower.jpg", 0, 100, 427)
axis = torch.linspace(-1, 1, SIZE)
points = torch.cartesian_prod(axis, axis)
inside = (points.square().sum(1) < 0.8**2).view(SIZE, SIZE)
wanted = slopes(source)
poisson = ti.Minimum(misfit, batched=False)  # quadratic
reference = ti.solve(poisson, target.clone(), solver=ti.NewtonKrylov()).value
reference = torch.where(inside, reference, target)


def train(field: torch.nn.Module, steps: int = 120) -> torch.Tensor:
    optimizer = torch.optim.Adam(field.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    flat, spread = inside.flatten(), wanted[inside].square().mean()
    for _ in range(steps):
        # between the pixels too, so that no jump hides there
        near = points[flat] + STEP * (2 * torch.rand_like(points[flat]) - 1)
        slope = gradient(field, near)
        aimed = grid_sample(wanted.permute(2, 0, 1)[None], near.detach().flip(1)[None, None], align_corners=True)
        outside = (field(points[~flat])[:, 0] - target[~inside]).square().mean() / target.var()
        loss = 10 * outside + (slope - aimed[0, :, 0].T).square().mean() / spread
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return torch.where(inside, field(points)[:, 0].view(SIZE, SIZE), target)


shown = {"picture": target, "pasted": torch.where(inside, source, target), "Poisson": reference}
for name, kind in (("implicit field", ImplicitSIREN), ("explicit field", SIREN)):
    torch.manual_seed(0)
    shown[name] = train(kind(2, 1, width=64, scale=12.0))
for name in ("pasted", "implicit field", "explicit field"):
    values = shown[name]
    error = (values - reference)[inside].square().mean().sqrt()
    seam = misfit(values) / misfit(reference)
    print(f"{name:14s}: {error:.3f} from Poisson's solution; {seam:.2f} of its energy")

if len(sys.argv) > 1:  # the picture
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 5, figsize=(13, 2.9), layout="constrained")
    for ax, (name, values) in zip(axes, shown.items(), strict=True):
        ax.imshow(values, cmap="gray", vmin=0, vmax=1)
        ax.set(title=name, xticks=[], yticks=[])
    figure.savefig(sys.argv[1], dpi=120)
