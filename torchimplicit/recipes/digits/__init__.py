"""A small convolutional equilibrium classifier of scikit-learn's 8×8 digits: ``demo`` and ``digits``.

One config serves both. It trains one classifier for each gradient estimator, side by side: from the same initial
weights, on the same batches in the same order, each step of one beside the same step of the others, so that whatever
else the machine does slows all alike.
"""

from torchimplicit.recipes.digits.config import DigitsConfig


def demo() -> DigitsConfig:
    """Exact and phantom gradients compared, the estimates audited against the exact gradient as training goes."""
    return DigitsConfig(estimators=("implicit", "unrolled-phantom", "neumann-phantom"), epochs=6, audit_every=33)


def digits() -> DigitsConfig:
    """One estimator, trained longer, without audits."""
    return DigitsConfig()


__all__ = ["DigitsConfig", "demo", "digits"]
