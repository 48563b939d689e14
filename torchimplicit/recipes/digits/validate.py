"""A classifier on images that it was not trained on."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch.nn import functional

from torchimplicit.errors import ConvergenceWarning
from torchimplicit.models import ConvDEQClassifier
from torchimplicit.recipes.digits.data import Split

ROWS = 360
"""Images at a time: all of the default validation split."""


@dataclass(frozen=True)
class Validated:
    """What was found.

    Attributes:
        accuracy: share of the images that are classified right.
        loss: mean cross-entropy (nats).
        evaluations: of the cell, mean over the images.
        residual: of the equilibria, the largest (relative).
        converged: share of the images whose solve reached its tolerance.
    """

    accuracy: float
    loss: float
    evaluations: float
    residual: float
    converged: float


@torch.no_grad()
def validate(classifier: ConvDEQClassifier, split: Split) -> Validated:
    """Classify a whole split."""
    device = next(classifier.parameters()).device
    was_training = classifier.training
    classifier.eval()
    rows: list[torch.Tensor] = []
    residual = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for images, labels in zip(split.images.split(ROWS), split.labels.split(ROWS), strict=True):
            images, labels = images.to(device), labels.to(device)
            scores = classifier(images)
            loss = functional.cross_entropy(scores, labels, reduction="none")
            solution = classifier.equilibrium.solution
            assert solution is not None
            right = scores.argmax(dim=1) == labels
            spent = torch.full_like(loss, solution.evaluations)
            rows.append(torch.stack([t.to(loss.dtype) for t in (right, loss, spent, solution.converged)]))
            residual = max(residual, float(solution.residual.max()))
    classifier.train(was_training)
    accuracy, mean_loss, evaluations, converged = torch.cat(rows, dim=1).double().mean(dim=1).tolist()
    return Validated(accuracy, mean_loss, evaluations, residual, converged)
