"""The loss that pre-trains a network of density coefficients, without a minimization."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from torchimplicit.models.orbital_free import CoefficientNetwork
from torchimplicit.recipes.density.examples import Example, slopes_of
from torchimplicit.recipes.density.learning_settings import Pretraining
from torchimplicit.recipes.runtime.task import generator

FARTHEST = 6e-3
"""The largest L at which a quadratic model is trusted."""

FORGOTTEN, AT_REFERENCE = 0.05, 0.03
"""Probabilities that a molecule's walk restarts at the superposition of atoms, and at the reference density."""

PERTURBED = 0.7
"""Share of the labels whose densities are displaced."""


class PretrainingLoss:
    """The training loss over some molecules, and the figures of others.

    Of a slope :math:`g` that the functional has beside the one that it should have, what counts is how far it moves the
    minimum, :math:`\\lVert Rg\\rVert^2/2N` (:func:`~torchimplicit.models.orbital_free.response`): to first order, the
    implicit loss. Of energies it is their error per electron, where the functional is quadratic (a potential) that of
    its own minimum, :math:`\\tfrac12\\delta^TH\\delta` below that at the reference density, :math:`\\delta=-Rg`.
    """

    def __init__(
        self, network: CoefficientNetwork, examples: Sequence[Example], held: Sequence[Example], config: Pretraining
    ):
        self.network, self.examples, self.held, self.config = network, examples, held, config
        self.walks = [example.start.clone() for example in examples]

    def loss(self, numbers: list[int], step: int) -> float:
        """Loss of a batch of molecules; its gradient is left in the network."""
        chosen = [self.examples[number] for number in numbers]
        if self.config.kind == "functional":
            total = self._of_functional(numbers, chosen, generator(self.config.seed, step, 1))
        else:
            total = self._of_tangent(chosen)
        total = total / len(chosen)
        total.backward()
        return float(total.detach())

    def figures(self) -> dict[str, float]:
        """Figures of the held-out molecules: linearized 10³ L, and the error of the energy in mHa per electron."""
        losses, errors = [], []
        for example in self.held:
            tangent = self.config.kind != "functional"
            rows = example.guess if tangent else example.rows[:1]
            ((energy, slope),) = slopes_of(self.network, [example], [rows], recorded=False)
            losses.append(1e3 * float(half_square(self._missed(example, slope, [0])).sum()) / example.electrons)
            error = self._at_minimum(example, energy, slope) if tangent else energy - example.energies[:1]
            errors.append(1e3 * abs(float(error.detach())) / example.electrons)
        if not self.held:
            return {}
        figures = {"L": fmean(losses)}
        return figures if self.config.kind == "density" else {**figures, "dE": fmean(errors)}

    def kept(self) -> list[Tensor]:
        """The tensors for a checkpoint."""
        return self.walks

    def take(self, held: list[Tensor]) -> None:
        """Restore from a checkpoint."""
        self.walks = list(held)

    def _missed(self, example: Example, slope: Tensor, which: list[int]) -> Tensor:
        """The distance of each minimum from its target, ``[k, n]``; for a directly predicted density, its own
        distance."""
        if self.config.kind == "density":
            return example.start - slope @ example.plain.T
        if self.config.metric == "overlap":
            return slope @ example.plain.T - example.plainly[which]
        return slope @ example.answer.T - example.wanted[which]

    def _at_minimum(self, example: Example, energy: Tensor, slope: Tensor) -> Tensor:
        """The error of the energy at the minimum to second order, ``[1]``, given those of the network at the guess.

        How much lower it is than at the reference density is taken as given: differentiated, it would bend the slopes
        by the sign of the energy's error, and make densities worse (1000 steps on QM9: L .23e-3, not .15e-3).
        """
        away = (example.rows[:1] - example.guess).flatten(1)[:, example.place]
        with torch.no_grad():
            beside = slope @ example.plain.T - example.plainly[:1]
            lower = 0.5 * (beside * (slope @ example.answer.T - example.wanted[:1])).sum(dim=1)
        return energy + (slope * away).sum(dim=1) - lower - example.energies[:1]

    def _of_tangent(self, chosen: list[Example]) -> Tensor:
        total = torch.zeros(())
        slopes = slopes_of(self.network, chosen, [example.guess for example in chosen], recorded=True)
        for example, (energy, slope) in zip(chosen, slopes, strict=True):
            total = total + 2e3 * half_square(self._missed(example, slope, [0])).mean() / example.electrons
            if self.config.kind == "potential" and self.config.energy_weight:
                error = self._at_minimum(example, energy, slope)
                total = total + self.config.energy_weight * 1e2 * error.abs().mean() / example.electrons
        return total

    def _of_functional(self, numbers: list[int], chosen: list[Example], generator: torch.Generator) -> Tensor:
        total = torch.zeros(())
        which, moves = [], []
        for number, example in zip(numbers, chosen, strict=True):
            others = torch.randperm(len(example.rows) - 1, generator=generator)[: self.config.at_once - 1]
            labels = [0, *(1 + others).tolist()]
            which.append(labels)
            moves.append(self._displaced(number, example, len(labels), generator))
        rows = [example.moved(example.rows[k], y) for example, k, y in zip(chosen, which, moves, strict=True)]
        slopes = slopes_of(self.network, chosen, rows, recorded=True)
        for number, example, labels, y, (energy, slope) in zip(numbers, chosen, which, moves, slopes, strict=True):
            missed = self._missed(example, slope, labels)
            total = total + 2e3 * half_square(missed).mean() / example.electrons
            # the slope that is missing is taken to be the same beside the label
            wanted = example.energies[labels] + (y * example.gradient(labels)).sum(dim=1)
            if self.config.energy_weight:
                error = (energy - wanted).abs().mean() / example.electrons
                total = total + self.config.energy_weight * 1e2 * error
            if self.config.policy:
                self._walk(number, example, (slope[0].detach() @ example.answer.T - example.wanted[0]))
        return total

    def _displaced(self, number: int, example: Example, count: int, generator: torch.Generator) -> Tensor:
        """Displacements of the labels ``[count, n]`` in the metric's coordinates: random ones, with the walk's for the
        first."""
        y = torch.zeros(count, len(example.start))
        if self.config.noise:
            y = torch.randn(y.shape, generator=generator) @ example.soft.T
            size = half_square(y) / example.electrons
            least, most = -5.0, math.log10(self.config.noise)
            target = 10 ** (least + (most - least) * torch.rand(count, generator=generator))
            kept = torch.rand(count, generator=generator) < PERTURBED
            y = y * (kept * (target / size).sqrt())[:, None]
        if self.config.policy:
            chance = float(torch.rand((), generator=generator))
            if chance < FORGOTTEN:
                self.walks[number] = example.start.clone()
            elif chance < FORGOTTEN + AT_REFERENCE:
                self.walks[number] = torch.zeros_like(example.start)
            y[0] = self.walks[number]
        return y

    def _walk(self, number: int, example: Example, missed: Tensor) -> None:
        """Move half a step towards the estimated minimum, given by the base's curvature and the slope at the walk's
        position."""
        walk = self.walks[number]
        walk = walk - 0.5 * (walk + missed)
        size = float(half_square(walk)) / example.electrons
        self.walks[number] = walk * min(1.0, (FARTHEST / max(size, 1e-12)) ** 0.5)


def half_square(t: Tensor) -> Tensor:
    """Half the squared norm of each row."""
    return 0.5 * t.square().sum(dim=-1)
