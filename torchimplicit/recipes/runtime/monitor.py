"""A Lightning callback that measures the accuracy of gradients while a model trains."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from torchimplicit.diagnostics import GradientProbe, probe_gradient, spectral_radius
from torchimplicit.diagnostics.compare import compared, tight
from torchimplicit.errors import ConvergenceWarning
from torchimplicit.flat_problem import tensors_of
from torchimplicit.gradients import Gradient, Implicit, PhantomReport, UnbiasedNeumann, Unrolled
from torchimplicit.nn import Equilibrium
from torchimplicit.precision import AutocastState
from torchimplicit.solution import Report, Solution
from torchimplicit.validation import at_least

OWN = ("cosine", "norm_ratio", "relative_error", "adjoint_residual", "exact_residual", "ascent", "spectral_radius")
"""Figures logged for a layer's own estimator as ``gradient/LAYER/FIGURE``, by the step's number from 1."""

BESIDE = ("cosine", "norm_ratio", "relative_error", "adjoint_residual", "ascent", "steps", "damping", "products")
"""Figures logged for another estimator as ``gradient/LAYER/NAME/FIGURE``."""


@dataclass(frozen=True)
class GradientRecord:
    """One layer's gradient estimate compared with the exact gradient, in one training step.

    Attributes:
        step: optimizer steps done.
        layer: its name in the module.
        estimator: empty for the layer's own, else the name under which it was given.
        cosine, norm_ratio, relative_error, adjoint_residual, exact_residual: see
            :class:`~torchimplicit.diagnostics.GradientComparison`; of the gradients in the cell's parameters and in
            the layer's input, for the cotangent that arrived at its output.
        ascent: 1 where the relative error is below 1: the ascent condition of Geng et al. (2021) for this cotangent,
            see :func:`~torchimplicit.diagnostics.ascent_condition`; else 0.
        steps, products: that it took: mean over the samples, and with the Jacobian in whole-batch equivalents.
        damping: mean of what an :class:`~torchimplicit.gradients.AdaptivePhantom` chose; NaN for others.
        spectral_radius, spectral_radius_max: of the Jacobian at the equilibrium, median and largest over the samples.
    """

    step: int
    layer: str
    estimator: str
    cosine: float
    norm_ratio: float
    relative_error: float
    adjoint_residual: float
    exact_residual: float
    ascent: float
    steps: float
    products: float
    damping: float
    spectral_radius: float
    spectral_radius_max: float


class MonitorGradient(Callback):
    """Compares the gradient of every :class:`~torchimplicit.nn.Equilibrium` with the exact one at regular steps.

    It needs nothing of the module: it notes what a layer was solved for and the cotangent that the ordinary backward
    pass brings to its output, and takes both gradients from these by itself, at the state that the layer returned.
    Training goes on as without it: the random state, gradients, buffers and warm starts are what they were. In steps
    between, and with ``every=0``, it watches nothing and costs nothing.

    If a layer is called several times in a step, the last call is compared; a layer differentiated by
    :class:`~torchimplicit.gradients.Unrolled` or from the solver's state is passed over.

    A module that measures its own time may have a method ``uncounted()``, a context in which the comparison is made.

    Args:
        every: optimizer steps between two comparisons; 0: never.
        exact: what to compare with, see :func:`~torchimplicit.diagnostics.compare_gradients`.
        beside: other estimators to compare with the exact gradient as well, by name.
        subspace: subspace of the spectral radius, see :func:`~torchimplicit.diagnostics.spectral_radius`; 0: do
            without.

    Attributes:
        records: all that was measured, oldest first. They travel in Lightning's checkpoints.
    """

    def __init__(
        self,
        every: int = 100,
        *,
        exact: Gradient | None = None,
        beside: Mapping[str, Gradient] | None = None,
        subspace: int = 16,
    ) -> None:
        at_least("MonitorGradient", "every", every, 0)
        at_least("MonitorGradient", "subspace", subspace, 0)
        self.every, self.exact, self.subspace = every, exact, subspace
        self.beside = dict(beside or {})
        self.records: list[GradientRecord] = []
        self._compared: int | None = None
        self._handles: list[RemovableHandle] = []
        self._seen: dict[str, _Seen] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"records": [asdict(record) for record in self.records]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.records = [GradientRecord(**record) for record in state_dict["records"]]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if not self.every or step % self.every or step == self._compared:
            return
        self._compared = step
        for name, layer in pl_module.named_modules():
            if isinstance(layer, Equilibrium):
                self._handles.append(layer.register_solution_hook(self._watcher(name)))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        arrived = [name for name, seen in self._seen.items() if seen.cotangent]
        if not arrived:
            return
        with getattr(pl_module, "uncounted", contextlib.nullcontext)():
            step = trainer.global_step
            figures: dict[str, float] = {}
            for name in arrived:
                for record in self._measured(step, name, self._seen.pop(name)):
                    self.records.append(record)
                    figures |= _logged(record)
            for logger in trainer.loggers:  # not pl_module.log, which would log at the trainer's own interval only
                logger.log_metrics(figures, step + 1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen = [], {}

    def _watcher(self, name: str) -> Any:
        def see(layer: Equilibrium, solution: Solution) -> None:
            gradient = layer.gradient or Implicit()
            leaves = pytree.tree_leaves(solution.value)
            if gradient.needs_solver_state or isinstance(gradient, Unrolled):
                return
            if any(leaf.requires_grad for leaf in leaves):
                self._seen[name] = _Seen(layer, gradient, solution)

        return see

    def _measured(self, step: int, name: str, seen: _Seen) -> list[GradientRecord]:
        problem, args = seen.solution.problem, seen.solution.args
        z = pytree.tree_map(lambda t: t.detach(), seen.solution.value)
        leaves, spec = pytree.tree_flatten(z)
        u = pytree.tree_unflatten([seen.cotangent.get(i, torch.zeros_like(t)) for i, t in enumerate(leaves)], spec)
        estimators = {"": seen.gradient, **self.beside}
        with _unchanged(seen.layer, estimators.values(), leaves[0].device), seen.autocast():
            wrt = tensors_of(problem, z, args)

            def probe(gradient: Gradient) -> GradientProbe:
                return probe_gradient(problem, z, *args, gradient=gradient, cotangent=u, wrt=wrt)

            exact = probe(self.exact or tight(leaves[0].dtype))
            probes = {key: probe(gradient) for key, gradient in estimators.items()}
            radius = torch.full((1,), torch.nan)
            if self.subspace:
                radius = spectral_radius(problem, z, *args, subspace=self.subspace, restarts=2).reshape(-1)
        records = []
        for key, values in probes.items():
            comparison = compared(values, exact)
            records.append(
                GradientRecord(
                    step=step,
                    layer=name,
                    estimator=key,
                    ascent=float(comparison.relative_error < 1),
                    steps=float(values.report.steps.double().mean()),
                    products=values.report.evaluations,
                    damping=_mean_damping(values.report),
                    spectral_radius=float(radius.median()),
                    spectral_radius_max=float(radius.max()),
                    **asdict(comparison),
                )
            )
        return records


def _mean_damping(report: Report) -> float:
    return float(report.damping.nanmean()) if isinstance(report, PhantomReport) else math.nan


def _logged(record: GradientRecord) -> dict[str, float]:
    where = f"gradient/{record.layer}/{record.estimator}".rstrip("/")
    figures = {figure: getattr(record, figure) for figure in (BESIDE if record.estimator else OWN)}
    return {f"{where}/{figure}": value for figure, value in figures.items() if not math.isnan(value)}


@dataclass
class _Seen:
    """A solve, and the cotangents that have reached its leaves."""

    layer: Equilibrium
    gradient: Gradient
    solution: Solution
    cotangent: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        leaves = pytree.tree_leaves(self.solution.value)
        self.autocast = AutocastState(leaves[0].device)
        for i, leaf in enumerate(leaves):
            if leaf.requires_grad:
                leaf.register_hook(self._keeper(i))

    def _keeper(self, i: int) -> Any:
        def keep(u: Tensor) -> None:
            self.cotangent[i] = u.detach().clone()

        return keep


@contextlib.contextmanager
def _unchanged(layer: nn.Module, gradients: Iterable[Gradient], device: torch.device) -> Iterator[None]:
    """Restore the random state and the layer's buffers afterwards."""
    buffers = [(buffer, buffer.clone()) for buffer in layer.buffers()]
    generators = [g.generator for g in gradients if isinstance(g, UnbiasedNeumann) and g.generator is not None]
    states = [generator.get_state() for generator in generators]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the residuals are recorded
        yield
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    for buffer, before in buffers:
        if not torch.equal(buffer, before):
            buffer.copy_(before)
