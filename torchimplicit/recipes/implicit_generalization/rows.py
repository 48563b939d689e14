"""The rows: which model, how it is trained, and what was published."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torchimplicit.recipes.errors import UserError
from torchimplicit.recipes.fields.cost import FieldCostConfig
from torchimplicit.recipes.fields.images.config import PictureConfig, generalization
from torchimplicit.recipes.fields.settings import FILTERS, FilterKind, Representation, full_batch, truncated
from torchimplicit.recipes.implicit_generalization.config import GeneralizationConfig
from torchimplicit.recipes.options import known_rows
from torchimplicit.recipes.runtime.table import Job

COST = "cost"
Kind = Literal["natural", "text"]
KINDS: tuple[Kind, ...] = ("natural", "text")
SIZES = {"1L": (1, 1), "1L-wide": (1, 2), "4L": (4, 1)}
"""Layers, and the width over w."""

NAMES = {
    ("siren", True): "iSIREN",
    ("siren", False): "SIREN",
    ("fourier", True): "Fourier-iMFN",
    ("fourier", False): "Fourier-MFN",
    ("gabor", True): "Gabor-iMFN",
    ("gabor", False): "Gabor-MFN",
}

# Huang et al. 2021, (Implicit)²: test PSNR in dB of 1L-256, 1L-512, 4L-256 at 512 pixels.
PUBLISHED: dict[Kind, dict[tuple[FilterKind, bool], tuple[float, float, float]]] = {
    "natural": {
        ("siren", True): (24.28, 24.92, 24.05),
        ("siren", False): (22.88, 24.52, 24.10),
        ("fourier", True): (24.88, 25.19, 24.52),
        ("fourier", False): (23.27, 23.30, 24.57),
        ("gabor", True): (24.91, 25.42, 24.53),
        ("gabor", False): (24.16, 24.68, 24.65),
    },
    "text": {
        ("siren", True): (26.06, 26.81, 26.31),
        ("siren", False): (24.54, 25.69, 26.21),
        ("fourier", True): (26.90, 27.19, 26.48),
        ("fourier", False): (24.64, 24.84, 26.67),
        ("gabor", True): (27.53, 28.07, 27.40),
        ("gabor", False): (27.19, 27.74, 27.57),
    },
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model.

    Attributes:
        filter, implicit, size: which; the size is one of :data:`SIZES`.
        full: trained by solves from zero and the converged adjoint, in place of one evaluation a step and a truncated
            one: a row of our own.
    """

    filter: FilterKind
    implicit: bool
    size: str
    full: bool = False

    @property
    def name(self) -> str:
        """For folders and the command line."""
        kind = "implicit" if self.implicit else "explicit"
        return f"{self.filter}-{kind}-{self.size}" + ("-full" if self.full else "")

    def label(self, width: int) -> str:
        """For people."""
        layers, factor = SIZES[self.size]
        return f"{NAMES[self.filter, self.implicit]} {layers}L-{factor * width}" + (
            ", full solves" if self.full else ""
        )

    def published(self, kind: Kind) -> float | None:
        """In dB."""
        if self.full:
            return None
        return PUBLISHED[kind][self.filter, self.implicit][list(SIZES).index(self.size)]


TABLE = {
    row.name: row
    for row in (
        Row(filter=name, implicit=implicit, size=size)
        for name in FILTERS
        for implicit in (True, False)
        for size in SIZES
    )
}
FULL = {row.name: row for row in (Row(filter=name, implicit=True, size="1L", full=True) for name in FILTERS)}
ROWS = {**TABLE, **FULL}


@dataclass(frozen=True)
class Subject:
    """A picture to fit."""

    name: str
    kind: Kind
    file: Path | None = None


def subjects(config: GeneralizationConfig) -> list[Subject]:
    """The pictures.

    Raises:
        UserError: if the folder that is given holds none.
    """
    natural = [Subject(name, "natural") for name in config.natural]
    if config.data_dir is not None:
        files = sorted(p for p in config.data_dir.glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".tif"))
        if not files:
            raise UserError(f"--data-dir {config.data_dir} holds no PNG, JPEG or TIFF pictures")
        natural = [Subject(path.stem, "natural", path) for path in files]
    return [*natural, *(Subject(name, "text") for name in config.texts)]


def jobs(config: GeneralizationConfig) -> list[Job]:
    """Seed by seed and picture by picture, so that all rows have seen the machine alike; full solves for the first seed
    and the first picture of a kind, and the costs after the first picture."""
    known_rows(config.rows, (*ROWS, COST))
    wanted = [row for row in ROWS.values() if not config.rows or row.name in config.rows]
    pictures = subjects(config)
    firsts = [next((one for one in pictures if one.kind == kind), None) for kind in KINDS]
    made: list[Job] = []
    for seed in config.plan.all_seeds:
        first_seed = seed == config.plan.first_seed
        for subject in pictures:
            made += [
                Job(named(row, subject, seed), "implicit-image-generalization", training(config, row, subject, seed))
                for row in wanted
                if not row.full or (first_seed and subject in firsts)
            ]
            if first_seed and subject == pictures[0] and (not config.rows or COST in config.rows):
                made.append(Job(COST, "fields-cost", costs(config, subject, seed)))
    return made


def named(row: Row, subject: Subject, seed: int) -> str:
    """The name of a run."""
    return f"{row.name}-{subject.name}-seed{seed}"


def costs(config: GeneralizationConfig, subject: Subject, seed: int) -> FieldCostConfig:
    """The job that measures steps of all rows in turn."""
    return FieldCostConfig(names=tuple(ROWS), fits=tuple(training(config, row, subject, seed) for row in ROWS.values()))


def width(config: GeneralizationConfig) -> int:
    """w."""
    return config.width or (256 if config.plan.scale == "paper" else 64)


def training(config: GeneralizationConfig, row: Row, subject: Subject, seed: int) -> PictureConfig:
    """The settings of one run."""
    paper = config.plan.scale == "paper"
    steps = config.steps or (2000 if paper else 400)
    layers, factor = SIZES[row.size]
    equilibria = truncated()
    if row.full:
        equilibria = replace(equilibria, gradient="implicit")
    return replace(
        generalization(),
        file=subject.file,
        picture=subject.name if subject.file is None else "camera",
        size=config.size or (512 if paper else 64),
        representation=Representation(
            filter=row.filter,
            implicit=row.implicit,
            width=factor * width(config),
            depth=layers,
            amortize="off" if row.full else "refresh",
        ),
        optimization=replace(full_batch(steps, max(1, min(steps, 50 * round(steps / 600) or 50))), seed=seed),
        equilibria=equilibria,
        machine=config.machine,
    )
