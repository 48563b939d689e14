"""The runs of the table."""

from __future__ import annotations

from dataclasses import replace

from torchimplicit.recipes.graphs.config import ChainsConfig, MoleculesConfig, chains, cox2, proteins
from torchimplicit.recipes.phantom_graphs.config import CostConfig, PhantomGraphsConfig, SetName
from torchimplicit.recipes.runtime.table import Job
from torchimplicit.recipes.training.settings import Equilibria, Machine, Optimization

QUICK = {
    "COX2": Optimization(steps=660, batch_size=32, learning_rate=2e-3, validate_every=11),
    "PROTEINS": Optimization(steps=112, batch_size=64, learning_rate=2e-3, validate_every=14),
}
"""60 passes over the training part, and eight; a segment is one pass."""

CHAINS = ("identity", "uniform", "loose")
"""The variants of the chains; loose: the identity-like start at an everyday tolerance."""

LOOSE = 1e-6


def jobs(config: PhantomGraphsConfig) -> list[Job]:
    """In the order of what they tell: chains with one seed, costs, the folds, chains with more seeds.

    Folds are outermost and estimators innermost, so that what slows the machine for a while slows all of them.
    """
    chains_by_seed = [
        [
            Job(f"chains-{length}-{variant}-{seed}", "graphs-chains", chain(config, length, variant, seed))
            for length in config.lengths
            for variant in CHAINS
        ]
        for seed in config.plan.all_seeds
    ]
    costs = [
        Job(
            f"cost-{name.lower()}",
            "graphs-cost",
            CostConfig(training=molecules(config, name, 0, "implicit"), dampings=config.dampings),
        )
        for name in config.sets
    ]
    by_fold = [
        Job(f"{name.lower()}-fold{fold}-{row}", f"graphs-{name.lower()}", molecules(config, name, fold, row))
        for fold in range(config.folds)
        for name in config.sets
        for row in rows(config)
    ]
    return [*chains_by_seed[0], *costs, *by_fold, *(job for more in chains_by_seed[1:] for job in more)]


def rows(config: PhantomGraphsConfig | CostConfig) -> dict[str, float | None]:
    """The estimators by the names that the runs bear, with λ, which the exact one has not."""
    return {"implicit": None, **{f"upg-{damping:g}": damping for damping in config.dampings}}


def differentiated(equilibria: Equilibria, damping: float | None) -> Equilibria:
    """The same solves with another estimator."""
    if damping is None:
        return replace(equilibria, gradient="implicit")
    return replace(equilibria, gradient="unrolled-phantom", phantom_steps=5, phantom_damping=damping)


def molecules(config: PhantomGraphsConfig, name: SetName, fold: int, row: str) -> MoleculesConfig:
    """One fold of one set with one estimator."""
    published = cox2() if name == "COX2" else proteins()
    optimization = published.optimization if config.plan.scale == "paper" else QUICK[name]
    if config.passes is not None:
        optimization = replace(optimization, steps=config.passes * optimization.validate_every)
    return replace(
        published,
        optimization=replace(optimization, seed=config.plan.first_seed),
        equilibria=differentiated(published.equilibria, rows(config)[row]),
        machine=_machine(config),
        data_dir=config.data_dir,
        folds=config.folds,
        fold=fold,
        peek=True,
    )


def chain(config: PhantomGraphsConfig, length: int, variant: str, seed: int) -> ChainsConfig:
    """Chains of one length."""
    usual = chains()
    steps = 2000 if config.plan.scale == "paper" else usual.optimization.steps
    loose = replace(usual.equilibria, tolerance=LOOSE, backward_tolerance=LOOSE)
    return replace(
        usual,
        optimization=replace(usual.optimization, steps=steps, seed=seed),
        equilibria=loose if variant == "loose" else usual.equilibria,
        machine=replace(_machine(config), device="cpu"),
        length=length,
        start="uniform" if variant == "uniform" else "identity",
    )


def _machine(config: PhantomGraphsConfig) -> Machine:
    return Machine(tensorboard=False, device="auto" if config.plan.scale == "paper" else "cpu")
