"""A classifier that a small change of its input cannot move far, whatever its weights are.

`LipschitzEquilibrium` has one equilibrium for every input, and its output moves by at most `bound` times what
the input moves: by construction, before, during and after training. A digit is then certain up to a radius: no
change of the image below it, however chosen, can make another class win. Beside it a monotone equilibrium of the
same size: as unique, and more often right, but what its weights prove of its sensitivity is several times as large.
"""

import sys

import torch
from sklearn.datasets import load_digits

import torchimplicit as ti
from torchimplicit.diagnostics import certify
from torchimplicit.models import DenseMonotone, LipschitzEquilibrium, MonotoneEquilibrium

digits = load_digits()
images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = order[:1400], order[1400:]
solver = ti.FixedPointIteration(rtol=1e-4, max_steps=500)


def trained(layer: torch.nn.Module, unit: float) -> torch.nn.Module:
    """By a margin between the scores, in this unit."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=5e-3)
    for _ in range(12):
        for rows in train[torch.randperm(len(train))].split(100):
            loss = torch.nn.functional.multi_margin_loss(layer(images[rows]) / unit, labels[rows], margin=0.7)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return layer.requires_grad_(False)


def radii(scores: torch.Tensor, bound: float) -> torch.Tensor:
    """`[images]`: up to which change of the image its class is certain; negative where it is wrong.

    The difference of two scores moves by at most sqrt(2) times what all scores do.
    """
    right = scores.gather(1, labels[test, None])
    others = scores.scatter(1, labels[test, None], -torch.inf).amax(1, keepdim=True)
    return ((right - others) / (2**0.5 * bound))[:, 0]


torch.manual_seed(0)
x = images[test]
bounded = trained(LipschitzEquilibrium(64, 60, 10, bound=1.0, margin=0.5, solver=solver), unit=1.0)
proof = certify(bounded, bounded.state(x), x)
print(f"states of norm {bounded.state(x).norm(dim=1).mean():.2g} are within {proof.error.max():.2g} of the equilibrium")

injection, readout = torch.nn.Linear(64, 60), torch.nn.Linear(60, 10)
monotone = MonotoneEquilibrium(DenseMonotone(60, margin=0.5), injection, solver=solver)
free = trained(torch.nn.Sequential(monotone, readout), unit=1.0)
moved = certify(monotone, monotone(x), x).sensitivity
norms = [float(torch.linalg.matrix_norm(linear.weight, 2)) for linear in (injection, readout)]

found = {}
for name, layer, bound in (("bounded", bounded, 1.0), ("monotone", free, float(moved) * norms[0] * norms[1])):
    found[name] = radii(layer(x), bound)
    share = [100 * float((found[name] > r).float().mean()) for r in (0.0, 0.2, 0.4)]
    slopes = torch.func.vmap(torch.func.jacrev(lambda x, layer=layer: layer(x[None])[0]))(x[:50])
    print(
        f"{name:8}: {share[0]:.1f} % right, {share[1]:.1f} % certain for changes of .2, {share[2]:.1f} % of .4; "
        f"1 moves the scores by at most {bound:.3g}, here by {torch.linalg.matrix_norm(slopes, 2).max():.2f}"
    )

if len(sys.argv) > 1:  # the picture
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    radius = torch.linspace(0, 1, 100)
    for name, reached in found.items():
        axis.plot(radius, (reached[:, None] > radius).float().mean(0), label=name)
    axis.set(xlabel="change of the image (Euclidean)", ylabel="share that is right for certain", ylim=(0, 1))
    axis.legend()
    figure.savefig(sys.argv[1], dpi=120)
