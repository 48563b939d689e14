"""Transferring colours between pictures by optimal transport, with the plan's exact derivative.

Sinkhorn's algorithm is a fixed point in the potentials, whose derivative takes one linear solve, independent
of the sweeps in the forward pass. Here the palette of a sunset is *learned*: colours move along the gradient
of the transport cost until the palette of a grey gradient has become the sunset's.
"""

import sys

import torch

import torchimplicit as ti

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
count, strength = 60, 0.02


def sweep(f: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    """One sweep for the potential `f` `[count]` of uniform masses; fixed up to a constant, which is taken off."""
    g = -strength * (torch.logsumexp((f[:, None] - cost) / strength, dim=0) - torch.tensor(count).log())
    f = -strength * (torch.logsumexp((g[None, :] - cost) / strength, dim=1) - torch.tensor(count).log())
    return f - f.mean()


def plan(cost: torch.Tensor) -> tuple[torch.Tensor, ti.Solution]:
    """The transport plan `[count, count]` with row and column sums `1 / count`."""
    solution = ti.solve(ti.FixedPoint(sweep, batched=False), torch.zeros(count), cost, solver=ti.Anderson(rtol=1e-9))
    f = solution.value
    g = -strength * torch.logsumexp((f[:, None] - cost) / strength, dim=0)
    coupling = ((f[:, None] + g[None, :] - cost) / strength).exp()
    return coupling / coupling.sum(), solution


t = torch.linspace(0, 1, count)[:, None]
sunset = (1 - t) * torch.tensor([0.15, 0.1, 0.35]) + t * torch.tensor([1.0, 0.55, 0.2]) + 0.05 * torch.randn(count, 3)
palette = (0.3 + 0.4 * torch.rand(count, 1) * torch.ones(3)).requires_grad_()
first = palette.detach().clone()

optimizer = torch.optim.Adam([palette], lr=0.03)
costs = []
for _ in range(40):
    cost = torch.cdist(palette, sunset).square()
    coupling, solution = plan(cost)
    transport = (coupling * cost).sum()
    optimizer.zero_grad()
    transport.backward()
    optimizer.step()
    costs.append(transport.item())
print(f"transport cost {costs[0]:.4f} -> {costs[-1]:.4f}; last solve: {solution.summary()}")

# the derivative of the plan itself, against finite differences
cost = torch.cdist(first, sunset).square()
direction = torch.randn_like(cost)
weights = torch.randn_like(cost)
slope = torch.func.jvp(lambda c: (plan(c)[0] * weights).sum(), (cost,), (direction,))[1]
ends = [(plan(cost + s * direction)[0] * weights).sum() for s in (1e-5, -1e-5)]
print(f"derivative of the plan {slope:.5f}, by differences {(ends[0] - ends[1]) / 2e-5:.5f}")

if len(sys.argv) > 1:  # the picture
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(9, 2.2), layout="constrained", width_ratios=(1, 1, 1, 2))
    for axis, colours, title in zip(axes, (first, palette.detach(), sunset), ("start", "learned", "target")):
        order = colours.sum(1).argsort()
        axis.imshow(colours[order].clamp(0, 1).reshape(6, 10, 3))
        axis.set(title=title, xticks=[], yticks=[])
    axes[3].semilogy(costs)
    axes[3].set(xlabel="step", ylabel="transport cost")
    figure.savefig(sys.argv[1], dpi=120)
