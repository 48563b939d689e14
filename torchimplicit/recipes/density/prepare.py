"""Computes the data files of many molecules in parallel and keeps them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from torchimplicit.models.orbital_free.molecule import Molecule
from torchimplicit.recipes.density import labels
from torchimplicit.recipes.density.chemistry import Geometry
from torchimplicit.recipes.density.compute import NotComputedError, compute
from torchimplicit.recipes.density.integrals import check_functional
from torchimplicit.recipes.density.settings import ChemistrySettings, LabelSettings
from torchimplicit.recipes.density.storage import BrokenFileError, file_name, load, read, write
from torchimplicit.recipes.runtime.errors import UserError

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
"""Environment variables that numerical libraries read when they are loaded."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome for one molecule.

    Attributes:
        geometry: the geometry.
        path: its file, unless it failed.
        reason: why it failed; empty if it did not.
        seconds: that its calculation took; nought for a file that was there.
        note: anything else worth telling.
    """

    geometry: Geometry
    path: Path | None = None
    reason: str = ""
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Prepared:
    """Molecules in the requested order, without those that failed."""

    molecules: list[Molecule]
    failures: list[Outcome]


def prepared(
    geometries: Sequence[Geometry],
    settings: ChemistrySettings,
    folder: Path,
    workers: int = 1,
    watch: Callable[[Outcome], None] = lambda outcome: None,
) -> Prepared:
    """Load the molecules, computing those that are not in ``folder`` yet; see :func:`prepare`."""
    outcomes = prepare(geometries, settings, folder, workers, watch)
    return Prepared(
        [load(outcome.path) for outcome in outcomes if outcome.path is not None],
        [outcome for outcome in outcomes if outcome.path is None],
    )


def prepare(
    geometries: Sequence[Geometry],
    settings: ChemistrySettings,
    folder: Path,
    workers: int = 1,
    watch: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Ensure a file in ``folder`` for every molecule. Intact files are kept; an interruption loses only what was being
    computed.

    Args:
        geometries: the geometries.
        settings: how.
        folder: made if there is none.
        workers: how many processes compute, a thread each; 1: this one. More than one need a main module that can be
            imported, as with all of Python's spawned processes.
        watch: is called with every outcome, as they come.

    Returns:
        an outcome for every geometry, in order; molecules that fail do not stop the others.

    Raises:
        UserError: the folder cannot be written; the functional is not known; PySCF is missing and something has to be
            computed.
    """
    work = Work(partial(file_name, settings=settings), partial(compute, settings=settings), write, read)
    return _done(work, geometries, settings, folder, workers, watch)


def prepare_labels(
    geometries: Sequence[Geometry],
    chemistry: ChemistrySettings,
    settings: LabelSettings,
    folder: Path,
    workers: int = 1,
    watch: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """The same for every molecule's labels; see :func:`prepare`."""
    asked: dict[str, Any] = {"chemistry": chemistry, "settings": settings}
    work = Work(partial(labels.file_name, **asked), partial(labels.labelled, **asked), labels.write, labels.read)
    return _done(work, geometries, chemistry, folder, workers, watch)


@dataclass(frozen=True)
class Work:
    """What to compute for a molecule; it can be sent to another process.

    Attributes:
        name: name of the file of a geometry.
        compute: compute a geometry's; the result has the ``seconds`` that it took, and what is in ``doubt`` of it.
        write: write a result to a path.
        read: read a file, with a :class:`~torchimplicit.recipes.density.storage.BrokenFileError` where it is none.
    """

    name: Callable[[Geometry], str]
    compute: Callable[[Geometry], Any]
    write: Callable[[Path, Any], None]
    read: Callable[[Path], Any]

    def there(self, path: Path) -> tuple[bool, str]:
        """Return whether the file exists and is intact, and a note."""
        if not path.exists():
            return False, ""
        try:
            return True, self.read(path).doubt
        except BrokenFileError as error:
            return False, f"computed again: {error}"

    def carry_out(self, geometry: Geometry, path: Path, note: str) -> Outcome:
        """Compute for one molecule and write its file."""
        try:
            result = self.compute(geometry)
            self.write(path, result)
        except (UserError, NotComputedError) as error:
            return Outcome(geometry=geometry, reason=str(error), note=note)
        except OSError as error:
            return Outcome(geometry=geometry, reason=f"{path} cannot be written ({error.strerror or error})", note=note)
        note = "; ".join(filter(None, (note, result.doubt)))
        return Outcome(geometry=geometry, path=path, seconds=result.seconds, note=note)


def _done(
    work: Work,
    geometries: Sequence[Geometry],
    settings: ChemistrySettings,
    folder: Path,
    workers: int,
    watch: Callable[[Outcome], None],
) -> list[Outcome]:
    """See :func:`prepare`."""
    _writable(folder)
    paths = [folder / work.name(geometry) for geometry in geometries]
    outcomes: dict[Path, Outcome] = {}
    wanted: dict[Path, tuple[Geometry, Path, str]] = {}
    for geometry, path in zip(geometries, paths, strict=True):
        if path in outcomes or path in wanted:  # asked for twice
            continue
        there, note = work.there(path)
        if there:
            outcomes[path] = Outcome(geometry=geometry, path=path, note=note)
            watch(outcomes[path])
        else:
            wanted[path] = (geometry, path, note)
    if wanted:
        check_functional(settings.functional)
    # larger molecules start first, so that none is left alone at the end
    for path, outcome in _computed(sorted(wanted.values(), key=lambda one: -sum(one[0].charges)), work, workers):
        outcomes[path] = outcome
        watch(outcome)
    return [outcomes[path] for path in paths]


def _computed(wanted: Sequence[tuple[Geometry, Path, str]], work: Work, workers: int) -> Iterator[tuple[Path, Outcome]]:
    """Yield outcomes as they come."""
    if workers == 1 or len(wanted) < 2:
        for geometry, path, note in wanted:
            yield path, work.carry_out(geometry, path, note)
        return
    context = multiprocessing.get_context("spawn")
    with _one_thread_each():
        pool = ProcessPoolExecutor(min(workers, len(wanted)), mp_context=context, initializer=_begin)
        try:
            running = {pool.submit(work.carry_out, *one): one for one in wanted}
            for future in as_completed(running):
                geometry, path, _ = running[future]
                try:
                    yield path, future.result()
                except BrokenProcessPool:
                    reason = "a process ended abruptly, perhaps for lack of memory; try again with fewer --workers"
                    yield path, Outcome(geometry=geometry, reason=reason)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    """Set up a new process: one thread; end at once when interrupted (files are written atomically) or when the parent
    has died."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_the_first, daemon=True).start()


def _end_with_the_first() -> None:
    """End with the parent, as a pool's processes would wait for work forever."""
    first = multiprocessing.parent_process()
    assert first is not None
    first.join()
    os._exit(1)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let processes started within use one thread each, which must be set before they load their libraries."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{folder} is a file; the molecules' files need a folder") from None
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror or error}); choose another --output") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written to; choose another --output")
