"""A constrained minimum as a layer: portfolios that learn to predict returns.

A linear model predicts the returns of eight assets from eight signals; a layer turns them into the portfolio
that maximizes return minus risk, with non-negative weights that add up to one and at most 40 % in either of
two sectors. Training minimizes the regret of the *decision*, through the layer, rather than the error of the
prediction.
"""

import sys

import torch

import torchimplicit as ti

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
assets, days = 8, 256
risk = torch.randn(assets, assets) / assets**0.5
risk = risk @ risk.T + 0.2 * torch.eye(assets)
sectors = torch.zeros(2, assets)
sectors[0, :2], sectors[1, 2:4] = 1, 1  # assets 0-1 and 2-3 are the sectors that are limited
signal = torch.randn(days, assets)
returns = torch.tanh(signal @ torch.randn(assets, assets)) + 0.1 * torch.randn(days, assets)
fit, test = slice(0, 192), slice(192, days)


def cost(weights: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return 0.5 * ((weights @ risk) * weights).sum(1) - (weights * expected).sum(1)


portfolio = ti.Minimum(
    cost, constraint=(ti.Simplex(1.0), ti.LinearInequalities(sectors, torch.full((2,), 0.4))), rowwise=True
)


def decide(expected: torch.Tensor) -> torch.Tensor:
    return ti.solve(portfolio, torch.full_like(expected, 1 / assets), expected).value


best = cost(decide(returns), returns)  # with tomorrow's returns known
model = torch.nn.Linear(assets, assets)
optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
regrets = []
for _ in range(40):
    weights = decide(model(signal[fit]))
    regret = (cost(weights, returns[fit]) - best[fit]).mean()
    optimizer.zero_grad()
    regret.backward()
    optimizer.step()
    regrets.append(regret.item())

with torch.no_grad():
    weights = decide(model(signal[test]))
    held = (cost(weights, returns[test]) - best[test]).mean()
    even = (cost(torch.full_like(weights, 1 / assets), returns[test]) - best[test]).mean()
print(f"regret of the decisions: {regrets[0]:.3f} -> {regrets[-1]:.3f} in training")
print(f"on days that were held out {held:.3f}, and {even:.3f} for even weights")
print(f"weights add up to {weights.sum(1).mean():.6f}, the least is {weights.min():.1e}")
print(f"the limited sectors hold at most {(weights @ sectors.T).max():.6f}")

if len(sys.argv) > 1:  # the picture
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.plot(regrets)
    left.set(xlabel="training step", ylabel="regret")
    bottom = torch.zeros(20)
    for asset in range(assets):
        right.bar(range(20), weights[:20, asset], bottom=bottom, label=f"{asset}")
        bottom = bottom + weights[:20, asset]
    right.set(xlabel="held-out day", ylabel="weight of each asset")
    figure.savefig(sys.argv[1], dpi=120)
