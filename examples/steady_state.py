"""The steady state of a reaction-diffusion equation, and its sensitivities.

Heat diffuses in a bar, is produced by a reaction that grows with the temperature, and leaves at both ends.
The steady state is the root of the discretized equation. One linear solve gives the derivative of its hottest
point in *every* point of the conductivity, and one call of `torch.func.jacfwd` gives the response of the
whole profile to the strength of the reaction.
"""

import sys

import torch

import torchimplicit as ti

torch.set_default_dtype(torch.float64)
n = 200
h = 1 / (n + 1)
position = torch.arange(1, n + 1) * h
source = 20 * torch.exp(-((position - 0.3) ** 2) / 0.01)


def residual(u: torch.Tensor, log_conductivity: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """-(k u')' - source - strength u sigmoid(u), with u = 0 at both ends; k is given at the cells' n + 1 edges."""
    padded = torch.nn.functional.pad(u, (1, 1))
    flux = log_conductivity.exp() * padded.diff() / h
    reaction = strength * u * torch.sigmoid(u)
    return -flux.diff() / h - source - reaction


steady = ti.Root(residual, batched=False)
log_conductivity = torch.zeros(n + 1, requires_grad=True)
strength = torch.tensor(5.0)
solution = ti.solve(steady, torch.zeros(n), log_conductivity, strength)
print(solution.summary())

hottest = solution.value.max()
hottest.backward()
sensitivity = log_conductivity.grad
print(f"hottest point {hottest:.4f}; conducting 1 % better everywhere changes it by {0.01 * sensitivity.sum():+.5f}")
with torch.no_grad():
    better = ti.solve(steady, solution.value, log_conductivity + 0.01, strength).value.max()
print(f"solved again with that: {better - hottest:+.5f}")


def profile(strength: torch.Tensor) -> torch.Tensor:
    return ti.solve(steady, torch.zeros(n), log_conductivity.detach(), strength).value


slope = torch.func.jacfwd(profile)(strength)
bend = torch.func.jacfwd(torch.func.jacfwd(profile))(strength)
ahead = profile(strength + 0.5)
first = profile(strength) + 0.5 * slope
second = first + 0.125 * bend
for order, guess in (("first", first), ("second", second)):
    print(f"profile at strength 5.5, extrapolated to {order} order: {(guess - ahead).abs().max():.1e} off")

if len(sys.argv) > 1:  # the picture
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.plot(position, solution.value.detach(), label="strength 5")
    left.plot(position, ahead, label="strength 5.5")
    left.set(xlabel="position", ylabel="temperature")
    left.legend()
    right.plot(torch.linspace(0, 1, n + 1), sensitivity / h)
    right.set(xlabel="position", ylabel="hottest point per log conductivity")
    figure.savefig(sys.argv[1], dpi=120)
