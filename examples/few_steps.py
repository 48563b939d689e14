"""An equilibrium in two steps: a learned start, and a student that is trained to arrive at once.

A multiscale equilibrium model learns the 8×8 digits with full solves. Then it is taught to be quick, on its
own solutions alone: `LearnedStart` predicts from the input where the solve begins, and a copy of the cell is
trained by `consistency` to lead from any state on the way to the equilibrium in one or two steps. Accuracy
and distance to the teacher's equilibrium after so many steps are those on held-out digits.
"""

import copy
import sys
import warnings

import torch
from sklearn.datasets import load_digits
from torch import nn

import torchimplicit as ti
from torchimplicit.models import MDEQ, mdeq_small
from torchimplicit.regularizers import consistency

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
train, test = torch.randperm(len(images)).split([1400, 397])

batches = [batch for _ in range(5) for batch in train[torch.randperm(len(train))].split(100)]

# The teacher, with full solves, which stop early while the map is not trained yet.
warnings.simplefilter("ignore", ti.ConvergenceWarning)
solver = ti.Anderson(rtol=1e-2, max_steps=20, keep_trajectory=True)
teacher = MDEQ(mdeq_small(downsamplings=0), solver=solver, gradient=ti.UnrolledPhantom(steps=3))
optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
for batch in batches:
    loss = nn.functional.cross_entropy(teacher(images[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
teacher.eval().requires_grad_(False)
layer = teacher.equilibrium


class Start(nn.Module):
    """From the injection, `[batch, 16, 8, 8]`, to the states of both resolutions."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()
        )
        self.fine, self.coarse = nn.Conv2d(32, 16, 1), nn.Conv2d(32, 16, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = self.body(x)
        return [self.fine(features), self.coarse(features)]


# The start and the student, on the teacher's solutions.
layer.start = ti.nn.LearnedStart(Start())
student = copy.deepcopy(layer.cell).requires_grad_()
optimizer = torch.optim.Adam([*layer.start.parameters(), *student.parameters()], lr=2e-3)
for batch in batches:
    injected = teacher.stem(images[batch])
    solution = layer.solve(injected)
    loss = layer.start.loss(solution) + consistency(ti.FixedPoint(student), solution, injected, count=3)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# After so many steps, on held-out digits.
with torch.no_grad():
    injected = teacher.stem(images[test])
    target = layer.solve(injected, solver=ti.Anderson(rtol=1e-5, max_steps=200)).value
    exact = (teacher.head(target).argmax(1) == labels[test]).float().mean()
    print(f"{exact:.1%} of {len(test)} digits are right at the equilibrium")
    starts = {"zeros": layer.cell.initial_state(injected), "learned start": layer.start(injected)}
    curves = {}
    for cell_name, cell in {"teacher": layer.cell, "student": student}.items():
        for start_name, z0 in starts.items():
            fast = ti.nn.Equilibrium(cell, rowwise=True)
            curve = curves[f"{cell_name}, {start_name}"] = []
            for steps in (0, 1, 2, 3, 4, 8, 16):
                z = fast(injected, z0=z0, solver=ti.FixedPointIteration(steps=steps))
                apart = sum((a - b).square().sum() for a, b in zip(z, target)) / sum(b.square().sum() for b in target)
                right = (teacher.head(z).argmax(1) == labels[test]).float().mean()
                curve.append((steps, right, apart.sqrt()))
            print(f"{cell_name}, {start_name}:", ", ".join(f"{right:.1%} after {n}" for n, right, _ in curve[:5]))

if len(sys.argv) > 1:  # the picture
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for name, curve in curves.items():
        steps, right, apart = zip(*curve)
        axes[0].plot(steps, right, marker="o", label=name)
        axes[1].semilogy(steps, apart, marker="o")
    axes[0].set(xlabel="steps", ylabel="accuracy")
    axes[0].legend()
    axes[1].set(xlabel="steps", ylabel="distance to the equilibrium")
    figure.savefig(sys.argv[1], dpi=120)
