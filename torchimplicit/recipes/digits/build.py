"""The classifier that a config describes."""

from __future__ import annotations

import torch

from torchimplicit.models import ConvDEQClassifier
from torchimplicit.recipes.digits.config import GROUPS, DigitsConfig, EstimatorName
from torchimplicit.recipes.digits.estimators import ESTIMATORS
from torchimplicit.solvers import Anderson


def solver(config: DigitsConfig) -> Anderson:
    """Of the forward solves."""
    return Anderson(rtol=config.tolerance, max_steps=config.solver_steps)


def classifier(config: DigitsConfig, name: EstimatorName) -> ConvDEQClassifier:
    """The classifier with one estimator; the initial weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return ConvDEQClassifier(
            channels=config.channels,
            groups=GROUPS,
            solver=solver(config),
            gradient=ESTIMATORS[name].make(config),
        )
