"""Meta-learning by implicit gradients (iMAML): an initialization from which a few shots suffice.

Every task is a sine with its own amplitude and phase, observed at ten points. The inner problem fits a
network's weights to them and keeps them close to the meta-parameters; the outer loss is the error elsewhere.
Its gradient depends only on the inner *solution*, not on the path to it, so the inner solver may be any
(Rajeswaran et al. 2019, equation 3).
"""

import sys

import torch
from torch.func import functional_call, vmap
from torch.nn.utils import parameters_to_vector

import torchimplicit as ti

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
nn = torch.nn
network = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
shapes = {name: p.shape for name, p in network.named_parameters()}
pull = 0.5  # how strongly the weights are held at the meta-parameters


def predict(flat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The network with the weights `flat`, at the points `x` `[points, 1]`."""
    parts = flat.split([shape.numel() for shape in shapes.values()])
    weights = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts)}
    return functional_call(network, weights, (x,))


def errors(weights: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The mean squared error of every task, `[tasks]`."""
    return (vmap(predict)(weights, x) - y).square().mean(dim=(1, 2))


def energy(weights: torch.Tensor, x: torch.Tensor, y: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
    return errors(weights, x, y) + 0.5 * pull * (weights - meta).square().sum(dim=1)


def tasks(count: int, points: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Points to fit and points to judge by, of sines with amplitudes 0.5 to 2 and any phase."""
    amplitude, phase = 0.5 + 1.5 * torch.rand(count, 1, 1), torch.pi * torch.rand(count, 1, 1)
    x_fit, x_held = 10 * torch.rand(2, count, points, 1) - 5
    return x_fit, amplitude * torch.sin(x_fit + phase), x_held, amplitude * torch.sin(x_held + phase)


inner = ti.Minimum(energy)  # the tasks are the batch
meta = parameters_to_vector(network.parameters()).detach().requires_grad_()
start = meta.detach().clone()
optimizer = torch.optim.Adam([meta], lr=5e-3)


def adapted(meta: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ti.solve(inner, meta.detach().expand(len(x), -1).clone(), x, y, meta).value


history = []
for _ in range(40):
    x_fit, y_fit, x_held, y_held = tasks(8, 10)
    loss = errors(adapted(meta, x_fit, y_fit), x_held, y_held).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    history.append(loss.item())

x_fit, y_fit, x_held, y_held = tasks(64, 10)
with torch.no_grad():
    for name, begin in (("a random start", start), ("the learned start", meta)):
        error = errors(adapted(begin, x_fit, y_fit), x_held, y_held).mean()
        print(f"error on 64 new tasks after fitting ten points from {name}: {error:.3f}")

if len(sys.argv) > 1:  # the picture
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.semilogy(history)
    left.set(xlabel="meta-training step", ylabel="error after fitting")
    grid = torch.linspace(-5, 5, 200)[:, None]
    with torch.no_grad():
        for name, begin in (("random start", start), ("learned start", meta)):
            right.plot(grid, predict(adapted(begin, x_fit[:1], y_fit[:1])[0], grid), label=name)
    right.plot(x_fit[0], y_fit[0], "ko")
    right.set(xlabel="x", title="a new task")
    right.legend()
    figure.savefig(sys.argv[1], dpi=120)
