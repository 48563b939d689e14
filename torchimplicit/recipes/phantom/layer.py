"""The recipe of Fig. 1: how the precision of the estimators on a synthetic layer depends on their settings.

After Geng et al. (2021), Fig. 1: one layer whose weight has the spectral norm 0.9, solved by 100 fixed-point iterations
to a relative error below 1e-5; the exact gradient by backpropagation through these iterations, and by implicit
differentiation.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from torchimplicit.diagnostics import GradientProbe, probe_gradient, spectral_radius
from torchimplicit.diagnostics.compare import Attached, compared
from torchimplicit.errors import ConvergenceWarning
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
from torchimplicit.recipes.phantom.settings import LayerConfig
from torchimplicit.recipes.runtime.run import Run, threads
from torchimplicit.recipes.runtime.settings import from_plain
from torchimplicit.recipes.runtime.table import Column, Table
from torchimplicit.solve import solve
from torchimplicit.solvers import FixedPointIteration

EXACT = Implicit(linear_solver=GMRES(rtol=1e-12))


@dataclass(frozen=True)
class GridPoint:
    """A phantom gradient beside the exact one.

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
    """The adaptive phantom gradient for one relative error that is asked for.

    Attributes:
        asked: of the adjoint vector, with the norm of W as the contraction.
        error: the largest of a sample.
        steps, damping: means of what it chose.
        cosine: of the gradient.
    """

    asked: float
    error: float
    steps: float
    damping: float
    cosine: float


@dataclass(frozen=True)
class Drawn:
    """Many draws of the unbiased series beside the series cut off where its draws end on average.

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
    """What was measured on one layer.

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

    @staticmethod
    def of(run: Run) -> LayerResults:
        """What a run has written."""
        return from_plain(LayerResults, run.read_json("results.json"))


class LayerRunner:
    """Measures; there is nothing to train."""

    def check(self, config: LayerConfig) -> None:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`: it runs everywhere."""

    def train(self, config: LayerConfig, run: Run, console: Console) -> bool:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""
        with threads(1), console.status("Measuring"):
            found = Measurement(config).results()
        run.write_json("results.json", found)
        rows = [
            [
                name,
                f"{damping:g}",
                *(f"{p.cosine:.4f}" for p in found.grid if (p.estimator, p.damping) == (name, damping)),
            ]
            for name in ("UPG", "NPG")
            for damping in config.lambdas
        ]
        columns = [Column("Cosine"), Column("λ"), *(Column(f"k = {k}") for k in config.ks)]
        console.print(Table(columns, rows).rich_rows())
        return True

    def evaluate(self, config: LayerConfig, run: Run, console: Console) -> None:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`: measures again."""
        with threads(1):
            run.write_json("evaluation.json", Measurement(config).results())


RUNNER = LayerRunner()


class Measurement:
    """A layer, its equilibrium by the iterations, and the exact gradient there; all in double precision."""

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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the iterations are what they are; residuals are kept
            self.solution = solve(self.problem, torch.zeros_like(self.x), solver=solver, gradient=Unrolled())
        self.z = self.solution.value.detach()
        self.exact = self._probe(EXACT)

    def results(self) -> LayerResults:
        """Everything."""
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
        """The exact gradient, flat."""
        return _flat(self.exact.gradients)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator)

    def _probe(self, gradient: Gradient) -> GradientProbe:
        return probe_gradient(self.problem, self.z, gradient=gradient, cotangent=self.u, wrt=self.wrt)

    def _point(self, name: str, gradient: Gradient, steps: int, damping: float) -> GridPoint:
        found = compared(self._probe(gradient), self.exact)
        return GridPoint(name, steps, damping, found.cosine, found.norm_ratio)

    def _adapted(self, error: float) -> Adapted:
        gradient = AdaptivePhantom(tolerance=error, contraction=self.config.norm, max_steps=500)
        found = self._probe(gradient)
        assert isinstance(found.report, PhantomReport)
        gap = (found.adjoint - self.exact.adjoint).norm(dim=1) / self.exact.adjoint.norm(dim=1)
        return Adapted(
            asked=error,
            error=float(gap.max()),
            steps=float(found.report.steps.double().mean()),
            damping=float(found.report.damping.mean()),
            cosine=compared(found, self.exact).cosine,
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
