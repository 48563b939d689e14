"""``torchimplicit molecules``: computes data files of molecules."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from torchimplicit.recipes.density.chemistry import Geometry, distorted
from torchimplicit.recipes.density.prepare import Outcome, prepare, prepare_labels
from torchimplicit.recipes.density.settings import ChemistrySettings, LabelSettings
from torchimplicit.recipes.density.sources import Refused, gathered
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import cache_folder
from torchimplicit.recipes.runtime.settings import not_negative, positive
from torchimplicit.recipes.runtime.table import Column, Table


@dataclass(frozen=True)
class Molecules:
    """Compute molecules for density functionals with PySCF, one data file each; existing files are kept.

    Exit codes: 0, every molecule has its file; 1, some failed and are listed; 2, bad input, nothing was computed.
    """

    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SOURCE [SOURCE ...]")]
    """Names (H2, H2O, ...), .xyz files, folders or tar archives of them, or qm9, which is downloaded."""

    output: Path | None = None
    """Folder for the computed files. Default: the user's cache."""

    limit: int | None = None
    """Take at most this many molecules from each folder or archive."""

    smallest: bool = False
    """With --limit, take the molecules with the fewest atoms instead of the first ones."""

    charge: int = 0
    """Charge of every molecule, in elementary charges."""

    electrons: int | None = None
    """Expected number of electrons. A molecule is refused if its nuclei and charge give another number."""

    distort: float = 0.0
    """Standard deviation, in angstrom, of the random displacement of each coordinate in the --copies."""

    copies: int = 0
    """Number of randomly distorted copies of every molecule, in addition to the molecule itself."""

    seed: int = 0
    """Random seed of the distortions."""

    labels: int = 0
    """Also compute this many densities per molecule, with their energies and slopes, as training labels for
    'torchimplicit pretrain'. They are written to separate files."""

    workers: int = 1
    """Number of worker processes, each with one thread."""

    allow_large: bool = False
    """Also accept molecules with so many atoms that they are refused by default."""

    settings: ChemistrySettings = field(default_factory=ChemistrySettings)

    def run(self, console: Console) -> int:
        self._check()
        geometries, refused = self._geometries()
        folder = self.output or cache_folder("molecules")
        began = time.monotonic()
        for doubt in filter(None, (geometry.doubt for geometry in geometries)):
            console.print(f"Warning: {doubt}", highlight=False, soft_wrap=True)
        with _shown(console, (1 + (self.labels > 0)) * len(geometries)) as watch:
            outcomes = prepare(geometries, self.settings, folder, self.workers, watch)
            if self.labels:
                sound = [outcome.geometry for outcome in outcomes if outcome.path is not None]
                wanted = LabelSettings(count=self.labels)
                outcomes += prepare_labels(sound, self.settings, wanted, folder, self.workers, watch)
        failures = [*refused, *(Refused(o.geometry.name, o.reason) for o in outcomes if o.path is None)]
        if failures:
            table = Table([Column("not computed"), Column("why")], [[one.name, one.reason] for one in failures])
            console.print(table.rich_rows(console.width))
        done = {o.path: o for o in outcomes if o.path is not None}
        computed = sum(o.seconds > 0 for o in done.values())
        size = sum(path.stat().st_size for path in done)
        asked, what = len(geometries) + len(refused), "molecules"
        if self.labels:
            asked, what = 2 * asked, "files of molecules and of labels"
        console.print(
            f"{len(done)} of {asked} {what} in {folder} ({size / 1e6:.1f} MB): {computed} "
            f"computed in {time.monotonic() - began:.0f} s, {len(done) - computed} were there"
            + (f"; {len(failures)} failed" if failures else ""),
            highlight=False,
            soft_wrap=True,
        )
        return 1 if failures else 0

    def _check(self) -> None:
        if not self.sources:
            raise UserError("molecules needs at least one source, such as H2O, water.xyz, or a folder of xyz files")
        positive(self, "limit", "workers")
        not_negative(self, "distort", "copies", "seed", "labels")
        if (self.copies > 0) != (self.distort > 0):
            raise UserError("--copies and --distort go together: how many distorted copies, and by how much")

    def _geometries(self) -> tuple[list[Geometry], list[Refused]]:
        geometries, refused = gathered(
            self.sources,
            charge=self.charge,
            electrons=self.electrons,
            limit=self.limit,
            smallest=self.smallest,
            allow_large=self.allow_large,
            by_name=False,
        )
        distortions: list[Geometry] = []
        for geometry in geometries:
            for copy in range(1, self.copies + 1):
                try:
                    distortions.append(distorted(geometry, self.distort, self.seed, copy))
                except UserError as error:
                    refused.append(Refused(f"{geometry.name}-d{copy}", str(error)))
        return geometries + distortions, refused


@contextmanager
def _shown(console: Console, total: int) -> Iterator[Callable[[Outcome], None]]:
    """Show a progress bar on a terminal, a line per molecule elsewhere; failures and notes in either."""
    columns = (
        TextColumn("[bold]Molecules"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("•"),
        TimeElapsedColumn(),
        TextColumn("• left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[last]}"),
    )
    with Progress(*columns, console=console, expand=True, disable=not console.is_terminal) as bar:
        task, done = bar.add_task("molecules", total=total, last=""), count(1)

        def watch(outcome: Outcome) -> None:
            bar.update(task, advance=1, last=outcome.geometry.name)
            number = next(done)
            if console.is_terminal and outcome.path is not None and not outcome.note:
                return
            came = f"{outcome.seconds:.1f} s" if outcome.seconds else "was there"
            came = f"failed: {outcome.reason}" if outcome.path is None else came
            note = f" ({outcome.note})" if outcome.note else ""
            text = f"{number}/{total}  {outcome.geometry.name}  {came}{note}"
            bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

        yield watch
