"""The Lightning module that trains one task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from torchimplicit.gradients import Unrolled
from torchimplicit.nn import Equilibrium
from torchimplicit.recipes.runtime.errors import DivergedError
from torchimplicit.recipes.runtime.run import quietly
from torchimplicit.recipes.runtime.settings import Equilibria, Optimization, Trained, from_plain, to_plain
from torchimplicit.recipes.runtime.task import Costs, Shard, Stopwatch, Task, generator, solver, told
from torchimplicit.recipes.runtime.trainer import History, Validation
from torchimplicit.recipes.runtime.weights import begin_with
from torchimplicit.regularizers import jacobian_frobenius
from torchimplicit.solution import Solution
from torchimplicit.solvers import FixedPointIteration
from torchimplicit.state import detached


class TrainingModule(LightningModule):
    """Trains a task for a number of steps; an epoch of Lightning is a segment, the steps between two validations."""

    def __init__(self, task: Task, optimization: Optimization, equilibria: Equilibria, log_every: int = 1):
        super().__init__()
        self.log_every = log_every
        self.task = task
        self.optimization = optimization
        self.equilibria = equilibria
        self.history = History()
        self.last_loss = math.nan
        self._watch = Stopwatch()
        self._costs: Costs | None = None
        self._held_out = Costs(())
        self._sums: Tensor | None = None
        self._losses: list[Tensor] = []
        self.average: dict[str, Tensor] = {}
        self._origin: tuple[Callable[[Any], Task], Trained] | None = None

    @staticmethod
    def of(build: Callable[[Any], Task], config: Trained) -> TrainingModule:
        """The task of a config, with its initial weights, ready to be trained.

        A copy of the result, in a process that is spawned too, is made anew by ``build``, and then gets the weights:
        parametrized modules cannot be pickled.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(config.optimization.seed, -1).initial_seed())
            module = TrainingModule(build(config), config.optimization, config.equilibria, config.machine.log_every)
        if config.machine.weights is not None:
            begin_with(module.task, config.machine.weights)
        if config.machine.channels_last:
            module.task.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        module._origin = build, config
        return module

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._origin is None:
            return super().__reduce_ex__(protocol)
        return TrainingModule.of, self._origin, {"weights": self.state_dict(), "history": self.history}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "weights" not in state:
            super().__setstate__(state)
            return
        self.load_state_dict(state["weights"])
        self.history = state["history"]

    @property
    def layers(self) -> list[Equilibrium]:
        """The equilibria in the model."""
        return [module for module in self.task.modules() if isinstance(module, Equilibrium)]

    @property
    def steps_done(self) -> int:
        """Optimizer steps done."""
        return self.history.steps

    @property
    def total_steps(self) -> int:
        """Total number of optimizer steps."""
        return self.optimization.steps

    @property
    def at_best(self) -> bool:
        """Return whether the present weights are those of the best validation."""
        return self.history.best == self.history.steps

    @property
    def shard(self) -> Shard:
        """This process's share."""
        return Shard(self.trainer.global_rank, self.trainer.world_size)

    def status(self) -> str:
        """A short progress message."""
        text = f"loss {self.last_loss:.4g}" if math.isfinite(self.last_loss) else ""
        if self.history.validations:
            figures = told(self.history.validations[-1].figures, self.task.metric)
            shown = {name: value for name, value in figures.items() if name == self.task.metric.name or name != "loss"}
            text += ", validation " + ", ".join(f"{name} {value}" for name, value in shown.items())
        return text

    # optimizer

    def configure_optimizers(self) -> Any:
        chosen = self.optimization
        weights = [p for p in self.task.parameters() if p.requires_grad]
        rate, decay = chosen.learning_rate, chosen.weight_decay
        optimizer: Optimizer
        if chosen.optimizer == "sgd":
            optimizer = SGD(weights, lr=rate, weight_decay=decay, momentum=chosen.momentum, nesterov=chosen.nesterov)
        elif chosen.optimizer == "adamw":
            optimizer = AdamW(weights, lr=rate, weight_decay=decay)
        else:
            optimizer = Adam(weights, lr=rate, weight_decay=decay)
        schedule = LambdaLR(optimizer, lambda step: rate_share(chosen, step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        # of a batch that is cut, the gradients of all parts but the last are there already
        if self.optimization.accumulate == 1:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    # the average of the weights

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Replace the weights by their average, if one is kept."""
        if not self.average:
            yield
            return
        parameters = dict(self.task.named_parameters())
        kept = {name: parameters[name].detach().clone() for name in self.average}
        with torch.no_grad():
            for name, value in self.average.items():
                parameters[name].copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    parameters[name].copy_(value)

    @torch.no_grad()
    def _keep_average(self) -> None:
        share = self.optimization.averaging
        if not share:
            return
        for name, p in self.task.named_parameters():
            if p.requires_grad:
                if name in self.average:
                    self.average[name].lerp_(p, 1 - share)
                else:
                    self.average[name] = p.detach().clone()

    # data

    def train_dataloader(self) -> Iterable[Any]:
        done = self.history.steps
        return self.task.training_batches(
            range(done, min(done + self.optimization.validate_every, self.total_steps)), self.shard
        )

    def val_dataloader(self) -> Iterable[Any]:
        return self.task.held_out_batches("validation", self.shard)

    # one step

    def on_train_epoch_start(self) -> None:
        # a resumed run draws what the first would have drawn
        torch.manual_seed(generator(self.optimization.seed, self.history.steps, self.global_rank).initial_seed())
        self.task.begin()

    @property
    def logging(self) -> bool:
        """Return whether the current step is logged."""
        step = self.history.steps + 1
        return step % self.log_every == 0 or step == self.total_steps

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        self._costs = Costs(self.layers, self.task)
        self._watch.start(self.device if self.logging else _IDLE)

    def training_step(self, batch: Any, index: int) -> Tensor:
        count = self.optimization.accumulate
        self._losses = []
        if count == 1:
            total = self._part(batch)
        else:
            self.trainer.optimizers[0].zero_grad()
            parts = self.task.cut(batch, count)
            shares = [len(part[0]) / sum(len(one[0]) for one in parts) for part in parts]
            for part, share in zip(parts[:-1], shares[:-1], strict=True):
                self.trainer.precision_plugin.pre_backward(share * self._part(part, share), self).backward()
            total = shares[-1] * self._part(parts[-1], shares[-1])
        if self.logging:
            self.last_loss = float(torch.stack(self._losses).sum())
            if self.trainer.strategy.reduce_boolean_decision(not math.isfinite(self.last_loss), all=False):
                loss = "not finite in another process" if math.isfinite(self.last_loss) else self.last_loss
                raise DivergedError(f"the loss is {loss} at step {self.history.steps + 1}")
        self._watch.lap("forward_seconds", self.device if self.logging else _IDLE)
        return total

    def _part(self, batch: Any, share: float = 1.0) -> Tensor:
        """The contribution of a batch, or a part of one, to the loss."""
        step = self.history.steps
        with quietly(), self._pretraining(step):
            penalized = self._penalized(step)
            seen: list[Solution] = []
            handles = [
                layer.register_solution_hook(lambda layer, solution: seen.append(solution))
                for layer in (self.layers if penalized else ())
            ]
            try:
                loss = self.task.loss(batch)
            finally:
                for handle in handles:
                    handle.remove()
            total = loss
            for solution in seen:
                # at the detached state it moves the map and not the equilibrium: the usual, cheaper term
                penalty = jacobian_frobenius(solution.problem, detached(solution.value), *solution.args)
                total = total + self.equilibria.jacobian_weight * penalty
        self._losses.append(share * loss.detach())
        return total

    def _penalized(self, step: int) -> bool:
        """Return whether this step includes the Jacobian penalty; all processes agree."""
        chosen = self.equilibria
        if not chosen.jacobian_weight or step < chosen.pretrain_steps:
            return False
        draw = torch.rand((), generator=generator(self.optimization.seed, step, -3))
        return float(draw) < chosen.jacobian_probability

    @contextmanager
    def _pretraining(self, step: int) -> Iterator[None]:
        """Replace the solver by a few weight-tied applications during pretraining."""
        if step >= self.equilibria.pretrain_steps:
            yield
            return
        layers = self.layers
        usual = [(layer.solver, layer.gradient) for layer in layers]
        for layer in layers:
            layer.solver = FixedPointIteration(max_steps=self.equilibria.pretrain_depth, rtol=0.0)
            layer.gradient = Unrolled()
        try:
            yield
        finally:
            for layer, (solver, gradient) in zip(layers, usual, strict=True):
                layer.solver, layer.gradient = solver, gradient

    def uncounted(self) -> AbstractContextManager[None]:
        """Exclude a callback's own work from the step's seconds."""
        return self._watch.pause(self.device)

    def on_before_backward(self, loss: Tensor) -> None:
        self._watch.skip(self.device if self.logging else _IDLE)

    def on_after_backward(self) -> None:
        self._watch.lap("backward_seconds", self.device if self.logging else _IDLE)

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        logged = self.logging
        seconds = self._watch.stop(self.device if logged else _IDLE)
        assert self._costs is not None
        self._keep_average()
        self.history.steps += 1
        self.history.seconds += seconds["seconds"]
        if not logged:
            self._costs.close()
            return
        rates = self.optimizers().param_groups  # type: ignore[union-attr]
        row = {
            "loss": self.last_loss,
            "learning_rate": rates[0]["lr"],
            **seconds,
            **self._costs.figures(),
            "pretraining": float(self.history.steps <= self.equilibria.pretrain_steps),
        }
        self._costs.close()
        for logger in self.loggers:
            logger.log_metrics(row, self.history.steps)

    # validation

    def on_validation_epoch_start(self) -> None:
        self.task.begin()
        self._sums = None
        self._held_out = Costs(self.layers, self.task)
        self._evaluating = ExitStack()
        self._evaluating.enter_context(self.averaged())
        self._evaluating.enter_context(evaluation_budget(self.layers, self.equilibria))

    def validation_step(self, batch: Any, index: int) -> None:
        with quietly():
            sums = self.task.score(batch).double()
        self._sums = sums if self._sums is None else self._sums + sums

    def on_validation_epoch_end(self) -> None:
        assert self._sums is not None, "the validation split is empty"
        self._evaluating.close()
        costs = self._held_out.figures()
        self._held_out.close()
        total = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        assert isinstance(total, Tensor)
        validation = Validation(
            step=self.history.steps,
            seconds=self.history.seconds,
            figures=self.task.figures(total.tolist()),
            forward=costs["forward_evaluations"] / max(1, self._held_out.solves),
            unconverged=costs["unconverged"],
        )
        metric = self.task.metric
        known = {v.step: v.figures[metric.name] for v in self.history.validations}
        if self.history.best is None or metric.better(validation.figures[metric.name], known[self.history.best]):
            self.history.best = validation.step
        self.history.validations.append(validation)
        for logger in self.loggers:
            logger.log_metrics(
                {f"validation_{name}": value for name, value in validation.figures.items()}, validation.step
            )

    # checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["history"] = to_plain(self.history)
        if self.average:
            checkpoint["average"] = self.average

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history = from_plain(History, checkpoint["history"])
        self.average = {name: value.to(self.device) for name, value in checkpoint.get("average", {}).items()}


_IDLE = torch.device("cpu")
"""Stands in for a device on which nothing is waited for: only the clock is read."""


@contextmanager
def evaluation_budget(layers: Sequence[Equilibrium], settings: Equilibria) -> Iterator[None]:
    """Use the step budget of validation and test, if it differs."""
    usual = [layer.solver for layer in layers]
    if settings.evaluation_steps is not None:
        for layer, one in zip(layers, usual, strict=True):
            layer.solver = replace(one or solver(settings), max_steps=settings.evaluation_steps)
    try:
        yield
    finally:
        for layer, one in zip(layers, usual, strict=True):
            layer.solver = one


def rate_share(chosen: Optimization, step: int) -> float:
    """The learning rate as a share of its peak at a step, counted from 0."""
    if step < chosen.warmup_steps:
        return (step + 1) / chosen.warmup_steps
    if chosen.schedule == "cosine":
        left = max(1, chosen.steps - chosen.warmup_steps)
        turn = math.cos(math.pi * min(1.0, (step - chosen.warmup_steps) / left))
        return chosen.final_share + (1 - chosen.final_share) * 0.5 * (1 + turn)
    return chosen.decay ** sum(step >= milestone for milestone in chosen.milestones)
