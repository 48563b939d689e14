"""Watching the gradient changes nothing, costs nothing when off, and sees what is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger

import torchimplicit as ti
from torchimplicit.recipes.runtime.monitor import MonitorGradient

DIM = 6


class Cell(nn.Module):
    """Counts its evaluations, in a buffer as well."""

    def __init__(self) -> None:
        super().__init__()
        self.map = ti.nn.weight_norm(nn.Linear(DIM, DIM))
        self.drop = ti.nn.VariationalDropout(0.2)
        self.register_buffer("seen", torch.zeros(()))
        self.evaluations = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.evaluations += 1
        self.seen += 1
        return self.drop(torch.tanh(0.6 * self.map(z) + x))


class Module(LightningModule):
    def __init__(self, gradient: Any, warm_start: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(3, DIM)
        self.layer = ti.nn.Equilibrium(
            Cell(), gradient=gradient, solver=ti.Anderson(rtol=1e-5), warm_start=warm_start
        )  # fmt: skip
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(DIM, 2)
        self.losses: list[float] = []
        self.log_kept = Log()
        self.cotangent: Tensor | None = None
        self.given: Tensor | None = None

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        self.given = x
        z = self.layer(self.stem(x))
        z.register_hook(lambda u: setattr(self, "cotangent", u.clone()))
        loss = nn.functional.cross_entropy(self.head(self.drop(z)), y)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


class Log(DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, metrics))


def train(module: Module, *callbacks: Any, steps: int = 6, dtype: torch.dtype = torch.float32) -> Module:
    generator = torch.Generator().manual_seed(1)
    x, y = (
        torch.randn(4 * steps, 3, generator=generator, dtype=dtype),
        torch.randint(0, 2, (4 * steps,), generator=generator),
    )
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 4)
    torch.manual_seed(7)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=module.log_kept, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, batches)
    return module


GRADIENTS = [
    lambda: None,
    lambda: ti.UnrolledPhantom(),
    lambda: ti.UnbiasedNeumann(),
    lambda: ti.UnbiasedNeumann(generator=torch.Generator().manual_seed(2)),
]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("warm_start", [False, True])
def test_training_is_what_it_is_without(gradient, warm_start):
    plain = train(Module(gradient(), warm_start))
    monitor = MonitorGradient(every=2)
    watched = train(Module(gradient(), warm_start), monitor)
    assert watched.losses == plain.losses
    for name, value in watched.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
    assert [record.step for record in monitor.records] == [0, 2, 4]
    assert watched.layer.cell.evaluations > plain.layer.cell.evaluations


def test_it_costs_nothing_when_off():
    plain = train(Module(None))
    off = train(Module(None), MonitorGradient(every=0))
    assert off.layer.cell.evaluations == plain.layer.cell.evaluations
    rare = train(Module(None), MonitorGradient(every=100))  # only the first step
    once = train(Module(None), MonitorGradient(every=1), steps=1).layer.cell.evaluations
    first = train(Module(None), steps=1).layer.cell.evaluations
    assert rare.layer.cell.evaluations - plain.layer.cell.evaluations == once - first


def test_it_sees_what_is_there():
    monitor = MonitorGradient(every=1)
    exact = train(Module(ti.Implicit()), monitor)
    for record in monitor.records:
        assert record.layer == "layer"
        assert record.cosine == pytest.approx(1, abs=1e-5)
        assert record.norm_ratio == pytest.approx(1, abs=1e-3)
        assert record.ascent == 1
        assert 0 < record.spectral_radius <= record.spectral_radius_max < 1
    rows = [(step, row) for step, row in exact.log_kept.rows if "gradient/layer/cosine" in row]
    assert [step for step, _ in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1][1]["gradient/layer/cosine"] == monitor.records[-1].cosine
    rough = MonitorGradient(every=1)
    train(Module(ti.OneStep()), rough)
    assert all(0 < record.cosine < 0.9999 for record in rough.records)
    assert all(record.relative_error > 0.01 for record in rough.records)


def test_the_figures_are_those_of_the_step_itself():
    """Against the gradients that two backward passes of the layer give for the cotangent that arrived."""

    def plain() -> Module:
        module = Module(ti.NeumannPhantom(steps=2))
        module.layer.cell.map = nn.Linear(DIM, DIM)
        module.layer.cell.drop = nn.Identity()
        return module.double()

    torch.manual_seed(3)
    weights = plain().state_dict()
    monitor, module, fresh = MonitorGradient(every=1), plain(), plain()
    module.load_state_dict(weights)
    fresh.load_state_dict(weights)
    train(module, monitor, steps=1, dtype=torch.float64)
    assert module.cotangent is not None
    assert module.given is not None
    (record,) = monitor.records
    found = []
    for gradient in (ti.NeumannPhantom(steps=2), ti.Implicit()):
        fresh.layer.gradient = gradient
        x = fresh.stem(module.given).detach().requires_grad_()
        grads = torch.autograd.grad(fresh.layer(x), [x, *fresh.layer.parameters()], module.cotangent)
        found.append(torch.cat([g.flatten() for g in grads]))
    estimate, exact = found
    assert record.norm_ratio == pytest.approx(float(estimate.norm() / exact.norm()), rel=1e-4)
    assert record.relative_error == pytest.approx(float((estimate - exact).norm() / exact.norm()), rel=1e-4)
    assert record.cosine == pytest.approx(float(torch.cosine_similarity(estimate, exact, dim=0)), rel=1e-6)


def test_others_beside():
    """They are compared with the same exact gradient, and do not touch the training either."""
    own = torch.Generator().manual_seed(4)
    beside = {
        "adaptive": ti.AdaptivePhantom(tolerance=0.01),
        "unbiased": ti.UnbiasedNeumann(generator=own),
        "same": ti.OneStep(),
    }
    monitor = MonitorGradient(every=3, beside=beside)
    state = own.get_state()
    module = train(Module(ti.OneStep()), monitor)
    assert module.losses == train(Module(ti.OneStep())).losses
    assert torch.equal(own.get_state(), state)
    assert [record.estimator for record in monitor.records] == ["", *beside] * 2
    first, adaptive, unbiased, same = monitor.records[:4]
    assert same.cosine == first.cosine
    assert adaptive.adjoint_residual <= 0.01
    assert adaptive.cosine > first.cosine
    assert adaptive.steps > 1
    assert 0 < adaptive.damping < 2
    assert unbiased.products == unbiased.steps - 1
    (_, row), _ = [(step, row) for step, row in module.log_kept.rows if "gradient/layer/cosine" in row]
    assert row["gradient/layer/adaptive/damping"] == adaptive.damping
    assert "gradient/layer/same/damping" not in row


def test_layers_that_cannot_be_compared_are_passed_over():
    monitor = MonitorGradient(every=1)
    train(Module(ti.Unrolled()), monitor)
    assert not monitor.records


def test_records_travel():
    monitor = MonitorGradient(every=3)
    train(Module(ti.OneStep()), monitor)
    other = MonitorGradient(every=3)
    other.load_state_dict(monitor.state_dict())
    assert [*map(repr, other.records)] == [*map(repr, monitor.records)]  # their NaNs are not equal to themselves
    assert len(other.records) == 2


def test_mixed_precision():
    monitor = MonitorGradient(every=1)
    module = Module(ti.UnrolledPhantom())
    module.layer.solver = ti.Anderson(rtol=1e-2)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 3, generator=generator), torch.randint(0, 2, (8,), generator=generator)
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 4)
    Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[monitor], precision="bf16-mixed",
    ).fit(module, batches)  # fmt: skip
    assert len(monitor.records) == 2
    assert all(record.cosine > 0.5 for record in monitor.records)


def test_bad_settings():
    with pytest.raises(ValueError, match="every is -1"):
        MonitorGradient(every=-1)
