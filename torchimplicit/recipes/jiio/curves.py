"""Loss against time: joint inference beside nested optimization, at the same weights and for the same images.

All in eval mode, from the same start, on one thread; step sizes and tolerances are tuned on validation images for every
method, and the loss is that of an exact equilibrium at the latent that came out. The time is that of the process on
the CPU, the median over repeats in which the methods take turns.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from torchimplicit.errors import ConvergenceWarning
from torchimplicit.models import EquilibriumDecoder
from torchimplicit.problems import JointState
from torchimplicit.recipes.jiio.config import Joint
from torchimplicit.recipes.jiio.model import found, joint_solver, reconstruction
from torchimplicit.recipes.jiio.nested import METHODS, Method, nested
from torchimplicit.resolve import resolve
from torchimplicit.solvers import Anderson

JOINT = "jiio"
JOINT_STEPS = (4, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 20, 25, 30, 40, 60)
NESTED_STEPS = (10, 20, 40)
STEP_SIZES = (1.25, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0)
TUNED_AT = 12
DAMPINGS = ((0.8, 0.6, 1.0), (1.0, 0.6, 1.0), (1.0, 1.0, 1.0))
RATES: dict[Method, tuple[float, ...]] = {
    "adam": (0.03, 0.05, 0.1, 0.2, 0.4),
    "adam-one-step": (0.03, 0.05, 0.1, 0.2, 0.4),
    "gradient-descent": (0.5, 1.0, 2.0, 4.0, 8.0),
}
TOLERANCES = (1e-1, 1e-2, 1e-3)
SLACK = 1.01
"""A looser tolerance is taken where its loss is at most this many times that of the tightest."""


@dataclass(frozen=True)
class Measured:
    """One method with one number of steps.

    Attributes:
        method, steps: which.
        seconds: CPU time, the median.
        loss: after an exact solve, the mean over the images.
    """

    method: str
    steps: int
    seconds: float
    loss: float


@dataclass(frozen=True)
class Curves:
    """The measurement.

    Attributes:
        points: all.
        step_size, damping: of the joint solves.
        rates, tolerances: of the nested methods.
    """

    points: list[Measured]
    step_size: float
    damping: tuple[float, float, float]
    rates: dict[str, float]
    tolerances: dict[str, float]


def curves(decoder: EquilibriumDecoder, joint: Joint, validation: Tensor, test: Tensor, repeats: int) -> Curves:
    """Tune on ``validation`` and measure on ``test``, both ``[batch, channels, height, width]``. The decoder's weights
    and mode are left as they were."""
    was = decoder.training, [p.requires_grad for p in decoder.parameters()]
    decoder.eval().requires_grad_(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return _Measurement(decoder, joint).run(validation, test, repeats)
    finally:
        decoder.train(was[0])
        for parameter, wanted in zip(decoder.parameters(), was[1], strict=True):
            parameter.requires_grad_(wanted)


class _Measurement:
    def __init__(self, decoder: EquilibriumDecoder, joint: Joint):
        self.decoder, self.joint = decoder, joint
        self.exact = Anderson(rtol=1e-6, max_steps=300)

    def run(self, validation: Tensor, test: Tensor, repeats: int) -> Curves:
        pairs = [(size, damping) for size in STEP_SIZES for damping in DAMPINGS]
        step_size, damping = min(
            pairs, key=lambda pair: self.worth(self.jointly(validation, TUNED_AT, *pair), validation)
        )
        rates: dict[str, float] = {}
        tolerances: dict[str, float] = {}
        for method in METHODS:
            tried = {rate: self.tried(validation, method, rate, TOLERANCES[1]) for rate in RATES[method]}
            rate = min(tried, key=lambda rate: tried[rate])
            losses = {tolerance: self.tried(validation, method, rate, tolerance) for tolerance in TOLERANCES}
            rates[method] = rate
            tolerances[method] = next(t for t in TOLERANCES if losses[t] <= SLACK * losses[TOLERANCES[-1]])
        cases: dict[tuple[str, int], Callable[[], Tensor]] = {
            (JOINT, steps): lambda steps=steps: self.jointly(test, steps, step_size, damping)  # type: ignore[misc]
            for steps in JOINT_STEPS
        }
        for method in METHODS:
            for steps in NESTED_STEPS:
                cases[method, steps] = lambda method=method, steps=steps: nested(  # type: ignore[misc]
                    self.decoder,
                    self.loss,
                    test,
                    method,
                    steps=steps,
                    rate=rates[method],
                    tolerance=tolerances[method],
                )
        seconds: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
        losses_of: dict[tuple[str, int], float] = {}
        for repeat in range(repeats + 1):
            for case, run in cases.items():
                began = time.process_time()
                x = run()
                spent = time.process_time() - began
                if repeat:  # the first warms up
                    seconds[case].append(spent)
                else:
                    losses_of[case] = self.worth(x, test)
        points = [Measured(*case, median(seconds[case]), losses_of[case]) for case in cases]
        return Curves(points, step_size, damping, rates, tolerances)

    def loss(self, made: Tensor, x: Tensor, wanted: Tensor) -> Tensor:
        return (made - wanted).square().flatten(1).mean(dim=1) + self.joint.prior * x.square().mean(dim=1)

    def tried(self, wanted: Tensor, method: Method, rate: float, tolerance: float) -> float:
        steps = NESTED_STEPS[-1]
        return self.worth(
            nested(self.decoder, self.loss, wanted, method, steps=steps, rate=rate, tolerance=tolerance), wanted
        )

    @torch.no_grad()
    def jointly(self, wanted: Tensor, steps: int, step_size: float, damping: tuple[float, float, float]) -> Tensor:
        problem = reconstruction(self.decoder, self.joint.prior, step_size, wanted[0].numel())
        problem = replace(problem, damping=damping)
        solver = replace(joint_solver(self.joint, steps), rtol=1e-5)
        return found(self.decoder, problem, solver, wanted).value.x

    @torch.no_grad()
    def worth(self, x: Tensor, wanted: Tensor) -> float:
        pixels = wanted[0].numel()
        problem: Any = reconstruction(self.decoder, self.joint.prior, 1.0, pixels)
        z, _ = self.decoder.start(len(x))
        loss = resolve(problem, JointState(z, z, x), wanted, solver=self.exact, throw=False).loss / pixels
        return float(loss.double().mean().nan_to_num(nan=torch.inf))
