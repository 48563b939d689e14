"""Recipes that measure the accuracy of gradients: on a random layer, and while an image classifier is trained.

After Geng et al. (2021), Figs. 1 and 2. The weight of the layer has the spectral norm 0.9, and it is solved by 100
fixed-point iterations to a relative error below 1e-5; the exact gradient by backpropagation through these iterations,
and by implicit differentiation. Along the training many estimators are held against the exact gradient at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from torchimplicit._solve import solve
from torchimplicit.diagnostics import GradientProbe, probe_gradient, spectral_radius
from torchimplicit.diagnostics.compare import Attached, compared
from torchimplicit.gradients import (
    AdaptivePhantom,
    Gradient,
    Implicit,
    NeumannPhantom,
    PhantomReport,
    UnbiasedNeumann,
    Unrolled,
    UnrolledPhantom,
)
from torchimplicit.linear import GMRES
from torchimplicit.problems import FixedPoint
from torchimplicit.recipes.phantom.images import Classification, ImageConfig, ready
from torchimplicit.recipes.phantom.images import digits as bundled
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.run import quietly
from torchimplicit.recipes.runtime.settings import not_negative, numbers, option, positive
from torchimplicit.recipes.runtime.table import Column, Table
from torchimplicit.recipes.runtime.trainer import Measuring, Trainer
from torchimplicit.solvers import FixedPointIteration

if TYPE_CHECKING:
    from torchimplicit.recipes.runtime.monitor import MonitorGradient

# -- settings ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One random layer z = tanh(W z + U x + b), and the accuracy of every gradient estimator on it."""

    weight: Literal["gaussian", "orthogonal"] = "gaussian"
    """Distribution of W before scaling. The singular values of an orthogonal matrix are all equal, which is the harder
    case."""

    norm: float = 0.9
    """Spectral norm of W, which bounds the map's Lipschitz constant."""

    size: int = 128
    """Size of a state."""

    samples: int = 64
    """Number of inputs."""

    spread: float = 0.3
    """Standard deviation of the inputs. Small inputs leave tanh nearly linear, so that the bound on the Lipschitz
    constant is nearly attained."""

    iterations: int = 100
    """Fixed-point iterations of the forward pass."""

    ks: tuple[int, ...] = (1, 2, 3, 5, 7, 10, 15, 20)
    """Numbers of steps k of the phantom gradients."""

    lambdas: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 1.0)
    """Dampings λ of the phantom gradients."""

    errors: tuple[float, ...] = (0.5, 0.3, 0.1, 0.03, 0.01)
    """Relative errors requested of the adaptive phantom gradient."""

    draws: int = 400
    """Number of samples of the unbiased Neumann series."""

    seed: int = 0
    """Random seed of the layer, its inputs and the samples of the unbiased series."""

    def __post_init__(self) -> None:
        positive(self, "size", "samples", "spread", "iterations", "draws")
        not_negative(self, "seed")
        if not 0 < self.norm < 1:
            raise UserError(f"{option('norm')} must lie in (0, 1), or there is no fixed point; it is {self.norm}")
        numbers(self, "ks", "lambdas", "errors")
        if max(self.lambdas) > 1:
            raise UserError(f"{option('lambdas')} must be at most 1, and one is {max(self.lambdas)}")


def layer() -> LayerConfig:
    """The recipe of Fig. 1."""
    return LayerConfig()


def training() -> ImageConfig:
    """The recipe of Fig. 2, on the bundled digits."""
    return looking(bundled(), 10)


def looking(config: ImageConfig, every: int) -> ImageConfig:
    """The config with a measurement of the gradient at this interval."""
    return replace(config, machine=replace(config.machine, monitor_every=every))


# -- Every estimator on one random layer ------------------------------------------------------------------------------


TIGHT = Implicit(linear_solver=GMRES(rtol=1e-12))


@dataclass(frozen=True)
class GridPoint:
    """A phantom gradient compared with the exact one.

    Attributes:
        estimator: ``UPG`` or ``NPG``.
        steps, damping: k and λ.
        cosine, norm_ratio: see :class:`~torchimplicit.diagnostics.GradientComparison`.
    """

    estimator: str
    steps: int
    damping: float
    cosine: float
    norm_ratio: float


@dataclass(frozen=True)
class Adapted:
    """The adaptive phantom gradient for one requested relative error.

    Attributes:
        asked: requested relative error of the adjoint vector, with the norm of W as contraction factor.
        error: the largest of a sample.
        steps, damping: means of what it chose.
        cosine: cosine of the gradient.
    """

    asked: float
    error: float
    steps: float
    damping: float
    cosine: float


@dataclass(frozen=True)
class Drawn:
    """Many samples of the unbiased series, compared with the series truncated at their mean length.

    Attributes:
        draws: how many.
        terms: their mean number of terms.
        cosine: mean of the draws'.
        error: root mean square of the draws' relative errors.
        mean_error: relative error of the mean of all draws.
        truncated_error: relative error of the series cut off after ``terms``, rounded.
    """

    draws: int
    terms: float
    cosine: float
    error: float
    mean_error: float
    truncated_error: float


@dataclass(frozen=True)
class LayerResults:
    """The measurements on one layer.

    Attributes:
        residual: the largest relative residual of a sample after the iterations.
        agreement: cosine of the two exact gradients.
        radius: spectral radius of the Jacobian at the equilibrium, the largest of a sample.
    """

    residual: float
    agreement: float
    radius: float
    grid: list[GridPoint]
    adaptive: list[Adapted]
    unbiased: Drawn


class Measurement:
    """A layer, its equilibrium after the iterations, and the exact gradient there; all in double precision."""

    def __init__(self, config: LayerConfig):
        self.config = config
        self.generator = torch.Generator().manual_seed(config.seed)
        d, n = config.size, config.samples
        w = self._normal(d, d)
        w = torch.linalg.qr(w).Q if config.weight == "orthogonal" else w / torch.linalg.matrix_norm(w, 2)
        weights = config.norm * w, self._normal(d, d) / d**0.5, 0.1 * self._normal(d)
        self.wrt: tuple[Tensor, ...] = tuple(t.requires_grad_() for t in weights)
        self.x, self.u = config.spread * self._normal(n, d), self._normal(n, d)
        w, inject, bias = self.wrt
        self.problem = FixedPoint(lambda z: torch.tanh(z @ w.T + self.x @ inject.T + bias))
        solver = FixedPointIteration(rtol=0.0, atol=0.0, max_steps=config.iterations)
        with quietly():  # the iterations are what they are; residuals are kept
            self.solution = solve(self.problem, torch.zeros_like(self.x), solver=solver, gradient=Unrolled())
        self.z = self.solution.value.detach()
        self.exact = self._probe(TIGHT)

    def results(self) -> LayerResults:
        """All results."""
        config = self.config
        unrolled = torch.autograd.grad(self.solution.value, self.wrt, self.u)
        makes: dict[str, type[UnrolledPhantom] | type[NeumannPhantom]] = {"UPG": UnrolledPhantom, "NPG": NeumannPhantom}
        return LayerResults(
            residual=float(self.solution.residual.max()),
            agreement=float(torch.cosine_similarity(_flat(unrolled), self.true, dim=0)),
            radius=float(spectral_radius(self.problem, self.z).max()),
            grid=[
                self._point(name, make(steps=k, damping=damping), k, damping)
                for name, make in makes.items()
                for damping in config.lambdas
                for k in config.ks
            ],
            adaptive=[self._adapted(error) for error in config.errors],
            unbiased=self._drawn(UnbiasedNeumann(steps=1, survival=0.85, generator=self.generator)),
        )

    @property
    def true(self) -> Tensor:
        """The exact gradient, flattened."""
        return _flat(self.exact.gradients)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator)

    def _probe(self, gradient: Gradient) -> GradientProbe:
        return probe_gradient(self.problem, self.z, gradient=gradient, cotangent=self.u, wrt=self.wrt)

    def _point(self, name: str, gradient: Gradient, steps: int, damping: float) -> GridPoint:
        comparison = compared(self._probe(gradient), self.exact)
        return GridPoint(name, steps, damping, comparison.cosine, comparison.norm_ratio)

    def _adapted(self, error: float) -> Adapted:
        gradient = AdaptivePhantom(tolerance=error, contraction=self.config.norm, max_steps=500)
        estimate = self._probe(gradient)
        assert isinstance(estimate.report, PhantomReport)
        gap = (estimate.adjoint - self.exact.adjoint).norm(dim=1) / self.exact.adjoint.norm(dim=1)
        return Adapted(
            asked=error,
            error=float(gap.max()),
            steps=float(estimate.report.steps.double().mean()),
            damping=float(estimate.report.damping.mean()),
            cosine=compared(estimate, self.exact).cosine,
        )

    def _drawn(self, gradient: UnbiasedNeumann) -> Drawn:
        attached = Attached(self.problem, self.z, (), gradient)
        size, total, squares, cosines, terms = self.true.norm(), torch.zeros_like(self.true), 0.0, 0.0, 0.0
        for _ in range(self.config.draws):
            estimate = _flat(attached.pull(self.u, self.wrt)[1])
            assert attached.solution.adjoint is not None
            terms += attached.solution.adjoint.evaluations + 1
            total += estimate
            squares += float((estimate - self.true).square().sum())
            cosines += float(torch.cosine_similarity(estimate, self.true, dim=0))
        count = self.config.draws
        cut = self._probe(NeumannPhantom(steps=max(1, round(terms / count)), damping=1.0))
        return Drawn(
            draws=count,
            terms=terms / count,
            cosine=cosines / count,
            error=float((squares / count) ** 0.5 / size),
            mean_error=float((total / count - self.true).norm() / size),
            truncated_error=float((_flat(cut.gradients) - self.true).norm() / size),
        )


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def grid_table(results: LayerResults) -> Table:
    """The cosines over steps and dampings."""
    kinds = dict.fromkeys((p.estimator, p.damping) for p in results.grid)
    steps = dict.fromkeys(p.steps for p in results.grid)
    rows = [
        [
            name,
            f"{damping:g}",
            *(f"{p.cosine:.4f}" for p in results.grid if (p.estimator, p.damping) == (name, damping)),
        ]
        for name, damping in kinds
    ]
    return Table([Column("Cosine"), Column("λ"), *(Column(f"k = {k}") for k in steps)], rows)


LAYER = Measuring(measure=lambda config, run: Measurement(config).results(), name="results.json", show=grid_table)


# -- An image classifier whose gradient is looked at during training ---------------------------------------------------


ESTIMATORS: dict[str, tuple[str, Gradient]] = {
    "npg-1-1": ("one step", NeumannPhantom(steps=1, damping=1.0)),
    "npg-2-0.5": ("NPG(2, 0.5)", NeumannPhantom(steps=2, damping=0.5)),
    "npg-5-0.5": ("NPG(5, 0.5)", NeumannPhantom(steps=5, damping=0.5)),
    "npg-9-0.5": ("NPG(9, 0.5)", NeumannPhantom(steps=9, damping=0.5)),
    "npg-5-1": ("NPG(5, 1)", NeumannPhantom(steps=5, damping=1.0)),
    "upg-5-0.5": ("UPG(5, 0.5)", UnrolledPhantom(steps=5, damping=0.5)),
    "adaptive-0.3": ("adaptive, residual 0.3", AdaptivePhantom(tolerance=0.3, max_steps=60)),
    "adaptive-0.1": ("adaptive, residual 0.1", AdaptivePhantom(tolerance=0.1, max_steps=60)),
    "unbiased-5-0.5": ("unbiased(5, 0.5), p = 0.9", UnbiasedNeumann(steps=5, survival=0.9, damping=0.5)),
}
"""The estimators compared with the exact gradient during training, with their labels, by their names in the log."""

LABELS = {name: label for name, (label, _) in ESTIMATORS.items()}
BESIDE = {name: gradient for name, (_, gradient) in ESTIMATORS.items()}

EXACT = Implicit(linear_solver=GMRES(rtol=1e-5, max_steps=400, restart=100))
"""A long Krylov space, for weights at which the Jacobian's spectral radius exceeds 1."""


def monitor(every: int) -> MonitorGradient:
    """The callback."""
    from torchimplicit.recipes.runtime.monitor import MonitorGradient

    return MonitorGradient(every, exact=EXACT, beside=BESIDE)


TRAINING = Trainer(Classification, ready, monitor)
