"""The runs of the table."""

from __future__ import annotations

from dataclasses import dataclass

from torchimplicit.recipes.physics.config import EquationName, PhysicsConfig
from torchimplicit.recipes.physics.equations import EQUATIONS
from torchimplicit.recipes.physics_informed.config import OptimizerName, PhysicsInformedConfig
from torchimplicit.recipes.runtime.table import Job

ENDLESS = 10**9
"""Iterations: the time ends a run."""

THESIS_POINTS, THESIS_RATE, THESIS_SECONDS = 100_000, 1e-3, 3600.0
"""With ``--scale paper``: collocation points and learning rate of the thesis, and the time for a run."""


@dataclass(frozen=True)
class Model:
    """A model of the table.

    Attributes:
        label: for people.
        states: of the equilibrium; ``None`` for a network.
        width, depth: of the network's hidden layers.
    """

    label: str
    states: int | None = None
    width: int = 20
    depth: int = 2


MODELS = {
    "equilibrium-5": Model("equilibrium, 5 states", states=5),
    "network-5": Model("network, 2 × 5", width=5),
    "equilibrium-20": Model("equilibrium, 20 states", states=20),
    "network-20": Model("network, 2 × 20", width=20),
    "network-thesis": Model("network, 4 × 20", width=20, depth=4),
}
"""A network of two hidden layers has as many weights as the equilibrium of its width, and one bias vector more; the
last is the plain network of the thesis."""

OPTIMIZERS: dict[OptimizerName, str] = {"least-squares": "Gauss–Newton", "l-bfgs": "L-BFGS", "adam": "Adam"}
"""Labels."""


def jobs(config: PhysicsInformedConfig) -> list[Job]:
    """Ordinary equations first, which are short; then seeds are outermost, and models innermost, so that what slows the
    machine for a while slows all of them."""
    return [
        Job(name_of(equation, model, optimizer, seed), f"physics-{equation}", made)
        for short in (True, False)
        for seed in config.plan.all_seeds
        for equation in equations(config)
        if ordinary(equation) == short
        for optimizer in optimizers(config)
        for model in MODELS
        for made in [settings_of(config, equation, model, optimizer, seed)]
    ]


def equations(config: PhysicsInformedConfig) -> tuple[EquationName, ...]:
    """The thesis has one."""
    return config.equations if config.plan.scale == "cpu" else ("van-der-pol",)


def optimizers(config: PhysicsInformedConfig) -> tuple[OptimizerName, ...]:
    """The thesis has one."""
    return config.optimizers if config.plan.scale == "cpu" else ("adam",)


def name_of(equation: EquationName, model: str, optimizer: OptimizerName, seed: int) -> str:
    """The name of a run."""
    return f"{equation}-{model}-{optimizer}-{seed}"


def ordinary(equation: EquationName) -> bool:
    """Whether it has one coordinate."""
    return len(EQUATIONS[equation].inputs) == 1


def settings_of(
    config: PhysicsInformedConfig, equation: EquationName, model: str, optimizer: OptimizerName, seed: int
) -> PhysicsConfig:
    """The settings of a run."""
    chosen, paper = MODELS[model], config.plan.scale == "paper"
    seconds = config.ordinary_seconds if ordinary(equation) else config.partial_seconds
    points = config.ordinary_points if ordinary(equation) else config.partial_points
    return PhysicsConfig(
        equation=equation,
        model="network" if chosen.states is None else "equilibrium",
        states=chosen.states or 20,
        width=chosen.width,
        depth=chosen.depth,
        points=THESIS_POINTS if paper else points,
        optimizer=optimizer,
        iterations=ENDLESS,
        seconds=THESIS_SECONDS if paper else seconds,
        learning_rate=THESIS_RATE if paper else 1e-2,
        seed=seed,
        page=False,
    )
