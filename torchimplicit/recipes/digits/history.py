"""What is measured while a classifier trains. It travels in the checkpoint, so a resumed run has all of it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        loss: cross-entropy of the step's minibatch, before the update (nats).
        seconds: forward, backward and update, and nothing else.
        forward, backward: evaluations of the cell in the forward pass, and products with its Jacobian in the backward
            pass, as :class:`~torchimplicit.solution.Report` counts them.
        unconverged: share of the samples whose forward solve did not reach its tolerance.
    """

    loss: float
    seconds: float
    forward: float
    backward: float
    unconverged: float


@dataclass(frozen=True)
class Audit:
    """The estimate beside the exact gradient, at the same weights and on the same minibatch.

    Attributes:
        step: optimizer steps done.
        cosine: between the two gradients in all parameters up to the equilibrium (stem and cell).
        norm_ratio: length of the estimate over that of the exact gradient.
        adjoint_residual: ``‖u − (I − Jᵀ)g‖ / ‖u‖`` of the estimate's adjoint vector g, root mean square over samples.
        exact_residual: the same of the exact gradient: how exact it is.
        spectral_radius: of J at the equilibrium, median over the samples.
        spectral_radius_max: the largest.
    """

    step: int
    cosine: float
    norm_ratio: float
    adjoint_residual: float
    exact_residual: float
    spectral_radius: float
    spectral_radius_max: float


@dataclass(frozen=True)
class Validation:
    """The validation split after some steps.

    Attributes:
        step: optimizer steps done.
        accuracy: share of the images that are classified right.
        loss: mean cross-entropy (nats).
    """

    step: int
    accuracy: float
    loss: float


@dataclass
class Track:
    """Everything about one estimator's training."""

    steps: list[Step] = field(default_factory=list)
    audits: list[Audit] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)
