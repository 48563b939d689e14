"""An equilibrium classifier in plain PyTorch.

The hidden layer is the solution of `z = tanh(W z + U x)`. The norm of `W` is kept below one, so every input
has a unique equilibrium, and the gradient is that of the equilibrium, independent of the solver. It is
trained on the 8×8 digits of scikit-learn.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import torchimplicit as ti


class Cell(nn.Module):
    """One application of the map, for the state `z` and the input `x`."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.hidden = ti.nn.spectral_norm(nn.Linear(width, width), bound=0.95)
        self.inject = nn.Linear(inputs, width)

    def initial_state(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(len(x), self.hidden.out_features)

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.hidden(z) + self.inject(x))


torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
order = torch.randperm(len(x))
train, test = order[:1400], order[1400:]

layer = ti.nn.Equilibrium(Cell(64, 48), solver=ti.Anderson(rtol=1e-3), rowwise=True)
model = nn.Sequential(layer, nn.Linear(48, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

losses, steps = [], []
for epoch in range(15):
    for batch in train[torch.randperm(len(train))].split(100):
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        steps.append(layer.solution.steps.float().mean().item())
    if epoch % 5 == 4:
        print(f"epoch {epoch + 1:2d}: loss {losses[-1]:.3f}, {steps[-1]:.1f} steps of the solver a sample")

model.eval()
with torch.no_grad():
    right = model(x[test]).argmax(1) == y[test]
print(f"{right.float().mean():.1%} of {len(test)} held-out digits are right")
print(layer.solution.summary())

if len(sys.argv) > 1:  # the picture
    import matplotlib.pyplot as plt

    figure, (left, right_axes) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.semilogy(losses)
    left.set(xlabel="training step", ylabel="loss")
    right_axes.plot(steps)
    right_axes.set(xlabel="training step", ylabel="steps of the solver a sample")
    figure.savefig(sys.argv[1], dpi=120)
