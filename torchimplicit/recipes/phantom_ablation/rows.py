"""The rows: how each is trained, and what was published."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torchimplicit.recipes.errors import UserError
from torchimplicit.recipes.images.config import ImageConfig, cifar10
from torchimplicit.recipes.images.cost import CostConfig
from torchimplicit.recipes.phantom_ablation.config import PhantomAblationConfig
from torchimplicit.recipes.runtime.table import Job
from torchimplicit.recipes.training.settings import Equilibria, EstimatorName, Optimization

COST = "cost"
IMPLICIT, UPG, NPG = "implicit", "upg-5", "npg-5"
CONTROL = "implicit-plain"
DROPOUT = 0.25


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to train.

    Attributes:
        label: for people.
        published: accuracy and its deviation in %, as published; ``None`` for a row of our own.
        sgd, pretrained, dropout: otherwise Adam, from the start, and without.
        steps, damping: of the phantom gradient.
    """

    label: str
    published: tuple[float, float] | None = None
    gradient: EstimatorName = "implicit"
    sgd: bool = False
    pretrained: bool = False
    dropout: bool = False
    steps: int = 5
    damping: float = 0.5


def _upg(steps: int, damping: float) -> Row:
    return Row(
        label=f"UPG({steps}, {damping:g}): SGD", gradient="unrolled-phantom", sgd=True, steps=steps, damping=damping
    )


# Geng et al. 2021, table 1.
TABLE_1 = {
    IMPLICIT: Row(label="Implicit: Adam, pretraining, dropout", published=(85.0, 0.2), pretrained=True, dropout=True),
    "implicit-nopre": Row(label="Implicit: Adam, dropout", published=(82.3, 1.3), dropout=True),
    "implicit-nodrop": Row(label="Implicit: Adam, pretraining", published=(83.7, 0.1), pretrained=True),
    "implicit-sgd": Row(
        label="Implicit: SGD, pretraining, dropout", published=(84.5, 0.3), sgd=True, pretrained=True, dropout=True
    ),
    "implicit-sgd-nopre": Row(label="Implicit: SGD, dropout", published=(82.9, 1.5), sgd=True, dropout=True),
    UPG: replace(_upg(5, 0.5), published=(85.8, 0.5)),
    NPG: Row(label="NPG(5, 0.5): SGD", published=(85.6, 0.5), gradient="neumann-phantom", sgd=True),
    "upg-9-drop": replace(_upg(9, 0.5), label="UPG(9, 0.5): SGD, dropout", published=(86.1, 0.5), dropout=True),
    # what the table above lacks: the phantom rows' settings, with the exact gradient
    CONTROL: Row(label="Implicit: SGD", sgd=True),
}

SWEEP = {f"sweep-{k}-{damping:g}": _upg(k, damping) for k, damping in ((1, 0.5), (9, 0.5), (5, 0.25), (5, 1.0))}
"""Points of Fig. 3 beside A(5, 0.5)."""

# The CPU scale. The rates are those of a few chosen that did best on the validation split in single runs of 150 steps.
CPU_STEPS = 100
ADAM_RATE = {"cpu": 5e-3, "paper": 1e-3}


def jobs(config: PhantomAblationConfig) -> list[Job]:
    """Seed by seed, so that all rows have seen the machine alike."""
    made: list[Job] = []
    for place, seed in enumerate(config.plan.all_seeds):
        wanted = {**TABLE_1, **(SWEEP if place < config.sweep_seeds else {})}
        made += [Job(named(name, seed), "images-mnist", training(config, row, seed)) for name, row in wanted.items()]
        if not place:
            costs = CostConfig(image=training(config, TABLE_1[UPG], seed))
            made.insert(len(TABLE_1), Job(COST, "images-cost", costs))
    names = [*TABLE_1, *SWEEP, COST]
    unknown = [name for name in config.rows if name not in names]
    if unknown:
        raise UserError(f"--rows: there is no row {', '.join(unknown)}; the rows are {', '.join(names)}")
    return [job for job in made if not config.rows or job.name.partition("-seed")[0] in config.rows]


def named(row: str, seed: int) -> str:
    """The name of a row's run."""
    return f"{row}-seed{seed}"


def training(config: PhantomAblationConfig, row: Row, seed: int) -> ImageConfig:
    """The settings of one run."""
    paper = config.plan.scale == "paper"
    base = _paper(config) if paper else _cpu(config)
    steps = base.optimization.steps
    pretrain = (3000 if paper and config.steps is None else round(0.15 * steps)) if row.pretrained else 0
    return replace(
        base,
        dropout=DROPOUT if row.dropout else 0.0,
        optimization=_optimization(base.optimization, row, config.plan.scale, seed),
        equilibria=replace(
            base.equilibria,
            gradient=row.gradient,
            phantom_steps=row.steps,
            phantom_damping=row.damping,
            pretrain_steps=pretrain,
        ),
        machine=config.machine,
    )


def _optimization(base: Optimization, row: Row, scale: str, seed: int) -> Optimization:
    if row.sgd:
        return replace(base, optimizer="sgd", learning_rate=0.1, weight_decay=1e-4, seed=seed)
    return replace(base, optimizer="adam", learning_rate=ADAM_RATE[scale], weight_decay=2.5e-6, seed=seed)


def _paper(config: PhantomAblationConfig) -> ImageConfig:
    base = replace(cifar10(), data=config.images)
    steps = config.steps or base.optimization.steps
    chosen = replace(base.optimization, steps=steps, validate_every=min(steps, base.optimization.validate_every))
    return replace(base, data_dir=config.data_dir, optimization=chosen)


def _cpu(config: PhantomAblationConfig) -> ImageConfig:
    steps = config.steps or CPU_STEPS
    bundled = config.images == "digits"
    return ImageConfig(
        data=config.images,
        data_dir=config.data_dir,
        downsamplings=0 if bundled else 2,
        validation_images=300 if bundled else 1000,
        train_images=None if bundled else 9000,
        test_images=None if bundled else 2000,
        optimization=Optimization(
            steps=steps, batch_size=64, validate_every=max(1, min(steps, round(steps / 4))), clip_norm=5.0
        ),
        equilibria=Equilibria(solver="broyden", solver_steps=18, backward_steps=20),
    )
