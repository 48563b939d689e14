"""Splits the molecules of a training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console

from torchimplicit.models.orbital_free import Molecule
from torchimplicit.recipes.density import storage
from torchimplicit.recipes.density.chemistry import Geometry, distorted, symbol
from torchimplicit.recipes.density.prepare import Outcome, prepare
from torchimplicit.recipes.density.settings import Molecules
from torchimplicit.recipes.density.sources import gathered
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import cache_folder

SPLITS = ("train", "validation", "test")
SILENT = Console(quiet=True)


@dataclass(frozen=True)
class Split:
    """Molecules for training, validation and test.

    Attributes:
        train: the loss is theirs.
        validation: the weights are selected by them; empty: the last weights are taken.
        test: looked at once, at the end; empty: there are none.
        skipped: what could not be computed, a line each.
        files: files of the molecules, by their names.
    """

    train: list[Molecule]
    validation: list[Molecule]
    test: list[Molecule]
    skipped: list[str]
    files: dict[str, Path]

    def named(self, split: str) -> list[Molecule]:
        """The molecules of one of :data:`SPLITS`."""
        molecules: list[Molecule] = getattr(self, split)
        return molecules


def geometries(config: Molecules) -> tuple[dict[str, list[Geometry]], list[str]]:
    """The geometries of every split, and a line for each refused one."""
    originals, lost = gathered(config.sources, limit=config.limit, smallest=True)
    refused = [f"{one.name}: {one.reason}" for one in lost]
    if 2 * config.held_out >= len(originals):
        raise UserError(
            f"--held-out {config.held_out} takes {2 * config.held_out} molecules away, and there are {len(originals)}"
        )
    order: Iterable[int] = ()
    if config.held_out:
        order = np.random.default_rng(config.geometry_seed).permutation(len(originals))
    away = {int(place): SPLITS[1 + k // config.held_out] for k, place in enumerate(islice(order, 2 * config.held_out))}
    by_split: dict[str, list[Geometry]] = {split: [] for split in SPLITS}
    numbers = {"train": config.train_copies, "validation": config.validation_copies, "test": config.test_copies}
    for place, geometry in enumerate(originals):
        by_split[away.get(place, "train")].append(geometry)
        if place in away:
            continue
        copy = 0
        for split, count in numbers.items():
            for _ in range(count):
                copy += 1
                by_split[split].append(distorted(geometry, config.distort, config.geometry_seed, copy))
    known = {charge for geometry in by_split["train"] for charge in geometry.charges}
    for split in SPLITS[1:]:
        for geometry in [one for one in by_split[split] if not known.issuperset(one.charges)]:
            by_split[split].remove(geometry)
            lacking = ", ".join(symbol(charge) for charge in sorted({*geometry.charges} - known))
            refused.append(f"{geometry.name}: no training molecule has {lacking}")
    return by_split, refused


def located(config: Molecules, console: Console = SILENT) -> tuple[dict[str, dict[str, Path]], list[str]]:
    """The files of every split's molecules by name, computed if not yet in the folder; and a line for each skipped
    one. The console shows each molecule that is computed.

    Raises:
        UserError: a source that is refused, or nothing left to train on.
    """
    by_split, skipped = geometries(config)
    total = sum(map(len, by_split.values()))
    places = iter(range(1, total + 1))

    def tell(outcome: Outcome) -> None:
        place = next(places)
        if outcome.seconds:
            name, seconds = outcome.geometry.name, outcome.seconds
            console.print(f"{name} computed in {seconds:.0f} s, {place} of {total} molecules", highlight=False)
        if outcome.note:
            console.print(f"{outcome.geometry.name}: {outcome.note}", highlight=False, soft_wrap=True)

    folder = config.data_dir or cache_folder("molecules")
    files: dict[str, dict[str, Path]] = {}
    for name, ones in by_split.items():
        outcomes = prepare(ones, config.chemistry, folder, watch=tell)
        files[name] = {one.geometry.name: one.path for one in outcomes if one.path is not None}
        skipped += [f"{one.geometry.name}: {one.reason}" for one in outcomes if one.path is None]
    if not files["train"]:
        raise UserError("no molecule is left to train on: " + "; ".join(skipped))
    return files, skipped


def load(config: Molecules, console: Console = SILENT) -> Split:
    """Load all molecules, computing those that are not in the folder yet.

    Raises:
        UserError: see :func:`located`.
    """
    files, skipped = located(config, console)
    return Split(
        **{name: [storage.load(path) for path in there.values()] for name, there in files.items()},
        skipped=skipped,
        files={name: path for there in files.values() for name, path in there.items()},
    )
