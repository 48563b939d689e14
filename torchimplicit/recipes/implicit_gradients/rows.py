"""The runs: filters, pictures, and how the adjoint is cut."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torchimplicit.recipes.fields.cost import FieldCostConfig
from torchimplicit.recipes.fields.images.config import PictureConfig
from torchimplicit.recipes.fields.settings import FILTERS, FilterKind, truncated
from torchimplicit.recipes.implicit_generalization import rows as generalization
from torchimplicit.recipes.implicit_generalization.config import GeneralizationConfig
from torchimplicit.recipes.implicit_gradients.config import GradientsConfig
from torchimplicit.recipes.runtime.table import Job

COST = "cost"
CONVERGED = "converged"
Cut = int | None
"""The products T in the backward pass; ``None``: until it converges."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to train one model."""

    filter: FilterKind
    products: Cut

    @property
    def name(self) -> str:
        """For folders."""
        return f"{self.filter}-{CONVERGED if self.products is None else f'T{self.products}'}"


def cuts(config: GradientsConfig) -> list[Cut]:
    """All T, in order, and the converged adjoint."""
    return [*sorted(config.products), None]


def rows(config: GradientsConfig) -> list[Row]:
    """All of them."""
    return [Row(filter=name, products=cut) for name in FILTERS for cut in cuts(config)]


def pictures(config: GradientsConfig) -> list[generalization.Subject]:
    """What is fitted."""
    if config.file is not None:
        return [generalization.Subject(config.file.stem, "natural", config.file)]
    return [
        generalization.Subject(name, "text" if name in ("page", "text") or name.startswith("text-") else "natural")
        for name in config.pictures
    ]


def named(row: Row, picture: str, seed: int) -> str:
    """The name of a run."""
    return f"{row.name}-{picture}-seed{seed}"


def jobs(config: GradientsConfig) -> list[Job]:
    """Seed by seed and picture by picture; the costs after the first picture."""
    made = []
    for seed in config.plan.all_seeds:
        for subject in pictures(config):
            made += [
                Job(
                    named(row, subject.name, seed),
                    "implicit-image-generalization",
                    training(config, row, subject, seed),
                )
                for row in rows(config)
            ]
            if COST not in {job.name for job in made}:
                fits = {row.name: training(config, row, subject, seed) for row in rows(config)}
                made.append(Job(COST, "fields-cost", FieldCostConfig(names=tuple(fits), fits=tuple(fits.values()))))
    return made


def training(config: GradientsConfig, row: Row, subject: generalization.Subject, seed: int) -> PictureConfig:
    """The settings of one run: those of the table of generalization, but for the backward pass."""
    as_there = GeneralizationConfig(
        plan=config.plan, size=config.size, width=config.width, steps=config.steps, machine=config.machine
    )
    model = generalization.Row(filter=row.filter, implicit=True, size="1L")
    if row.products is None:
        equilibria = replace(truncated(), gradient="implicit")
    else:
        equilibria = truncated(row.products + 1)
    return replace(generalization.training(as_there, model, subject, seed), equilibria=equilibria)
