"""The recipe's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import fraction, not_negative, positive

EstimatorName = Literal["implicit", "unrolled-phantom", "neumann-phantom", "one-step"]
"""The estimators that are compared; :mod:`.estimators` describes and makes them."""

GROUPS = 4
"""Of the model's group normalization."""

POSITIVE = ("phantom_steps", "epochs", "max_steps", "batch_size", "learning_rate", "tolerance", "solver_steps")
NOT_NEGATIVE = ("weight_decay", "audit_every", "seed", "split_seed", "threads")


@dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """Train a small convolutional equilibrium classifier on scikit-learn's 8×8 digits (bundled, nothing is downloaded).

    Several estimators train side by side, from the same initial weights and on the same batches.
    """

    estimators: tuple[EstimatorName, ...] = ("implicit",)
    """How the equilibrium is differentiated; one classifier is trained for each."""

    phantom_steps: int = 5
    """k of the phantom gradients: the steps unrolled, or the terms of the Neumann series."""

    phantom_damping: float = 0.5
    """λ of the phantom gradients, in (0, 1]."""

    epochs: int = 12
    """Passes over the training split."""

    max_steps: int | None = None
    """Stop after this many optimizer steps, even within an epoch."""

    batch_size: int = 32
    """Images a step."""

    learning_rate: float = 2e-3
    """AdamW's peak learning rate: linear warm-up over the first tenth of the steps, then a cosine to zero."""

    weight_decay: float = 1e-4
    """AdamW's weight decay."""

    channels: int = 16
    """Channels of the equilibrium state, a multiple of 4."""

    tolerance: float = 1e-3
    """Relative tolerance of the forward solve (Anderson) and of the exact gradient's linear solve (GMRES)."""

    solver_steps: int = 40
    """The most steps of either solve."""

    audit_every: int = 0
    """After every so many steps compare the estimate with the exact gradient, outside the timed step; 0: never."""

    seed: int = 0
    """Of the initial weights and the order of the batches."""

    split_seed: int = 0
    """Of the split into training and validation images (80 % and 20 %, stratified)."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if there is one."""

    threads: int = 1
    """CPU threads; 0 leaves the number to PyTorch. The model is small, and more threads gain little on an idle machine
    and lose much on a busy one."""

    def __post_init__(self) -> None:
        if not self.estimators or len(set(self.estimators)) < len(self.estimators):
            raise UserError("--estimators must name at least one estimator, and none twice")
        positive(self, *POSITIVE)
        not_negative(self, *NOT_NEGATIVE)
        fraction(self, "phantom_damping")
        if self.channels < GROUPS or self.channels % GROUPS:
            raise UserError(f"--channels must be a multiple of {GROUPS}, and it is {self.channels}")
        if self.batch_size > 1000:
            raise UserError(f"--batch-size must be at most 1000 (of 1437 training images), and it is {self.batch_size}")


def demo() -> DigitsConfig:
    """Exact and phantom gradients compared, the estimates audited against the exact gradient as training goes."""
    return DigitsConfig(estimators=("implicit", "unrolled-phantom", "neumann-phantom"), epochs=6, audit_every=33)


def digits() -> DigitsConfig:
    """One estimator, trained longer, without audits."""
    return DigitsConfig()
