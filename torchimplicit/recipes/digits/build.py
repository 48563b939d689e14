"""The classifier that a config describes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from torchimplicit.models import ConvDEQClassifier
from torchimplicit.recipes.digits.config import GROUPS, DigitsConfig
from torchimplicit.recipes.digits.estimators import ESTIMATORS, EstimatorName
from torchimplicit.recipes.errors import UserError
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


def device(config: DigitsConfig) -> torch.device:
    """Where to train.

    Raises:
        UserError: if a GPU is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise UserError("--device cuda: PyTorch finds no CUDA device here; use --device cpu, or install a CUDA build")
    return torch.device("cuda" if available and config.device != "cpu" else "cpu")


@contextmanager
def threads(config: DigitsConfig) -> Iterator[None]:
    """PyTorch's number of CPU threads, while the context lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
