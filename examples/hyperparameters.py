"""Hyperparameters by their gradient: logistic regression with one penalty per feature.

The fit is the minimum of a penalized loss; the penalties minimize the held-out loss at that minimum. The
gradient in all penalties costs one linear solve, while a grid search over 30 dimensions is impossible. Only
ten of the features carry information; the others are noise.
"""

import sys

import torch
from torch.nn.functional import softplus

import torchimplicit as ti

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
features, informative = 30, 10
truth = torch.cat((2 * torch.randn(informative), torch.zeros(features - informative)))
x = torch.randn(3 * 150, features)
labels = (torch.rand(len(x)) < torch.sigmoid(x @ truth)).double() * 2 - 1
(x_fit, x_held, x_test), (y_fit, y_held, y_test) = x.split(150), labels.split(150)


def error(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return softplus(-y * (x @ w)).mean()


def energy(w: torch.Tensor, log_penalty: torch.Tensor) -> torch.Tensor:
    return error(w, x_fit, y_fit) + 0.5 * (log_penalty.exp() * w.square()).sum()


fit = ti.Minimum(energy, batched=False)  # the whole vector of weights is one system
log_penalty = torch.full((features,), -3.0, requires_grad=True)
optimizer = torch.optim.Adam([log_penalty], lr=0.2)
w = torch.zeros(features)
held, test = [], []
for _ in range(60):
    w = ti.solve(fit, w.detach(), log_penalty).value  # starts where the last fit ended
    loss = error(w, x_held, y_held)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    held.append(loss.item())
    test.append(error(w, x_test, y_test).item())

print(f"held-out loss {held[0]:.3f} -> {held[-1]:.3f}, test loss {test[0]:.3f} -> {test[-1]:.3f}")
kept, noise = log_penalty[:informative].exp().median(), log_penalty[informative:].exp().median()
print(f"median penalty: {kept:.3g} for features that matter, {noise:.3g} for noise")

# the same gradient by finite differences, in one direction
direction = torch.randn(features)


def held_out(p: torch.Tensor) -> torch.Tensor:
    return error(ti.solve(fit, w.detach(), p, solver=ti.LBFGS(rtol=1e-10)).value, x_held, y_held)


at = torch.full((features,), -1.0, requires_grad=True)
(gradient,) = torch.autograd.grad(held_out(at), at)
with torch.no_grad():
    difference = (held_out(at + 1e-4 * direction) - held_out(at - 1e-4 * direction)) / 2e-4
print(f"slope along a direction: {gradient @ direction:.6f}, by differences {difference:.6f}")
torch.testing.assert_close(gradient @ direction, difference, rtol=1e-4, atol=1e-8)

if len(sys.argv) > 1:  # the picture
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.plot(held, label="held-out")
    left.plot(test, label="test")
    left.set(xlabel="outer step", ylabel="loss")
    left.legend()
    colors = ["C0"] * informative + ["C7"] * (features - informative)
    right.bar(range(features), log_penalty.detach(), color=colors)
    right.set(xlabel="feature (blue: informative)", ylabel="log penalty")
    figure.savefig(sys.argv[1], dpi=120)
