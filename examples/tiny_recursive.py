"""A tiny recursive model: a small network applied repeatedly, trained through its last steps.

Hierarchical and tiny recursive models iterate on an answer and differentiate one step. Here the loop is a
solve with a given number of steps, so the gradient is one argument: `OneStep()` as published,
`UnrolledPhantom(k)` through k further steps, `Unrolled()` through all of them. The task: beads lie on a
string, and every place must know the colour of the last bead to its left, at any distance, by communicating
with its neighbour only.
"""

import sys

import torch
from torch import nn

import torchimplicit as ti
from torchimplicit.gradients import Gradient

COLOURS = 4


class Block(nn.Module):
    """One step: every position sees itself, its neighbour to the left, and its bead."""

    def __init__(self, width: int):
        super().__init__()
        self.mix = nn.Sequential(nn.Linear(2 * width + COLOURS, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)

    def forward(self, z: torch.Tensor, beads: torch.Tensor) -> torch.Tensor:
        left = nn.functional.pad(z, (0, 0, 1, 0))[:, :-1]
        return self.norm(z + self.mix(torch.cat((z, left, beads), dim=2)))


def batch(count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Beads `[count, length, colours]`, one-hot or zero, and the colour that each place is to know."""
    colour = torch.randint(0, COLOURS, (count, length))
    there = torch.rand(count, length) < 0.15
    there[:, 0] = True
    last = torch.where(there, torch.arange(length), 0).cummax(dim=1).values
    return nn.functional.one_hot(colour, COLOURS) * there[..., None].float(), colour.gather(1, last)


def train(gradient: Gradient, width: int = 24, steps: int = 20) -> tuple[list[float], float]:
    """Per-position accuracy along training, and on sequences twice as long with twice the steps."""
    torch.manual_seed(0)
    block, head = Block(width), nn.Linear(width, COLOURS)
    layer = ti.nn.Equilibrium(block, solver=ti.FixedPointIteration(steps=steps), gradient=gradient, rowwise=True)
    optimizer = torch.optim.AdamW([*block.parameters(), *head.parameters()], lr=5e-3)
    accuracy = []
    for _ in range(150):
        beads, colour = batch(64, 16)
        answer = head(layer(beads, z0=torch.zeros(64, 16, width)))
        loss = nn.functional.cross_entropy(answer.flatten(0, 1), colour.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(block.parameters(), 1.0)
        optimizer.step()
        accuracy.append((answer.argmax(2) == colour).float().mean().item())
    beads, colour = batch(256, 32)
    with torch.no_grad():
        longer = ti.FixedPointIteration(steps=2 * steps)
        answer = head(layer(beads, z0=torch.zeros(256, 32, width), solver=longer))
    return accuracy, (answer.argmax(2) == colour).float().mean().item()


curves = {}
for gradient in (ti.OneStep(), ti.UnrolledPhantom(steps=4), ti.Unrolled()):
    name = type(gradient).__name__
    curves[name], long = train(gradient)
    print(f"{name:16s} accuracy {sum(curves[name][-10:]) / 10:.1%}, on sequences twice as long {long:.1%}")

if len(sys.argv) > 1:  # the picture
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    for name, curve in curves.items():
        axis.plot(curve, label=name)
    axis.set(xlabel="training step", ylabel="positions that are right")
    axis.legend()
    figure.savefig(sys.argv[1], dpi=120)
