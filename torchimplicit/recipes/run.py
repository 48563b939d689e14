"""A run's directory: what it holds, and how one is made without touching another."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock, Timeout

from torchimplicit.recipes import defaults, files
from torchimplicit.recipes.environment import version
from torchimplicit.recipes.errors import StorageError, UserError
from torchimplicit.recipes.plain import to_plain

RUNS = Path("runs")
"""Where runs go unless told otherwise, below the working directory: ``runs/<recipe>/<number>``."""

State = Literal["running", "interrupted", "complete", "diverged"]

_CLAIM, _RESERVE = ".claim", ".reserve"
_RESERVED = 1 << 17
"""Bytes that a run sets aside, so that on a full disk it can still note how it ended."""


@dataclass(frozen=True)
class RunOptions:
    """Where the run is written."""

    output: Path | None = None
    """The run's directory, which must be new or empty. By default the next free number below runs/<recipe>/."""

    overwrite: bool = False
    """Let --output hold an earlier run, which is replaced. Files that are no part of a run stay."""


@dataclass(frozen=True)
class Run:
    """One training run on disk.

    The directory holds ``run.json`` (the recipe, its settings and how far it came), ``checkpoints/last.ckpt``,
    ``logs/metrics.csv`` and whatever the recipe writes.
    """

    path: Path

    @property
    def description(self) -> Path:
        """Which recipe, with which settings, in which state."""
        return self.path / "run.json"

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint; it may not exist yet."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def best(self) -> Path:
        """The checkpoint of the best validation; it may not exist yet."""
        return self.path / "checkpoints" / "best.ckpt"

    @property
    def metrics(self) -> Path:
        """The CSV log."""
        return self.path / "logs" / "metrics.csv"

    @property
    def previous(self) -> Path:
        """The checkpoint before the last one; it may not exist."""
        return self.path / "checkpoints" / "previous.ckpt"

    def describe(self, recipe: str, config: Any, table: str = "") -> None:
        """Write ``run.json`` for a run that begins: every setting, and the library's own defaults.

        Args:
            recipe: in the registry.
            config: its settings.
            table: the checksum of the settings of the table that the run is for, if it is for one.
        """
        self.write_json(
            "run.json",
            {
                "recipe": recipe,
                "state": "running",
                "torchimplicit_version": version(),
                **({"table": table} if table else {}),
                "config": to_plain(config, exact=True),
                "defaults": defaults.present(),
            },
        )

    def mark(self, state: State, reason: str = "") -> None:
        """Note how the run stands, and why if it has stopped."""
        assert state in get_args(State)
        noted = {key: value for key, value in self.read().items() if key != "reason"}
        noted |= {"state": state, **({"reason": reason} if reason else {})}
        try:
            self.write_json("run.json", noted)
        except StorageError:
            if not (self.path / _RESERVE).is_file():
                raise
            (self.path / _RESERVE).unlink()
            self.write_json("run.json", noted)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """No other process may train into this run meanwhile; a killed one's claim ends with it.

        Raises:
            UserError: if one does.
        """
        with files.writing(self.path / _CLAIM):
            claim = FileLock(self.path / _CLAIM, timeout=0)
            try:
                claim.acquire()
            except Timeout:
                raise UserError(f"another process is training into {self}; wait for it, or stop it") from None
        try:
            for stale in (*self.path.glob(".*.draft*"), *(self.path / "checkpoints").glob(".*.draft*")):
                stale.unlink(missing_ok=True)  # of a process that was killed
            with suppress(OSError):
                (self.path / _RESERVE).write_bytes(os.urandom(_RESERVED))
            yield
        finally:
            (self.path / _RESERVE).unlink(missing_ok=True)
            claim.release()

    def read(self) -> dict[str, Any]:
        """``run.json``.

        Raises:
            UserError: if the directory holds no run, or a broken one.
        """
        if not self.path.is_dir():
            raise UserError(f"{self.path} is no directory; give the directory of a run, such as runs/digits/001")
        if not self.description.is_file():
            raise UserError(f"{self.path} holds no run (it has no run.json); give a directory that 'train' has written")
        read = files.read_json(self.description, quiet=True)
        try:
            assert isinstance(read["recipe"], str)
            assert isinstance(read["config"], dict)
            assert read["state"] in get_args(State)
            assert isinstance(read.get("torchimplicit_version", ""), str)
            assert all(Path(name).name == name for name in read.get("products", []))
            assert all(isinstance(fields, dict) for fields in read.get("defaults", {}).values())
        except (ValueError, KeyError, TypeError, AssertionError, AttributeError) as error:
            raise UserError(f"{self.description} cannot be read ({error!r}); train again") from None
        return read

    def write_json(self, name: str, value: Any) -> Path:
        """Write ``value`` as strict JSON with its checksum; a reader never sees half a file."""
        files.write_json(self.path / name, to_plain(value))
        return self.path / name

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file that :meth:`write_json` has written.

        Raises:
            DamagedFileError: it is not what was written.
        """
        return files.read_json(self.path / name)

    def advance(self, draft: Path) -> None:
        """A whole new checkpoint becomes the last one, and the last one that before it."""
        with files.writing(self.checkpoint):
            if self.checkpoint.is_file():
                second = self.previous.with_suffix(".draft")
                second.unlink(missing_ok=True)
                try:
                    os.link(self.checkpoint, second)  # so that there is a last one at every moment
                except OSError:  # not every file system has links
                    shutil.copyfile(self.checkpoint, second)
                os.replace(second, self.previous)
            os.replace(draft, self.checkpoint)

    def save(self, value: Any) -> None:
        """Write the last checkpoint, of tensors and plain values; see :meth:`advance`."""
        draft = self.checkpoint.with_suffix(".draft")
        files.save(value, draft)
        self.advance(draft)

    def product(self, name: str) -> Path:
        """Where to write a file beside the page and the figures; the run remembers it as its own, and tells of it."""
        known = self.products()
        if name not in known:
            self.write_json("run.json", {**self.read(), "products": [*known, name]})
        return self.path / name

    def products(self) -> list[str]:
        """The names that :meth:`product` was asked for."""
        return list(self.read().get("products", []))

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file of the run in one move."""
        files.write_text(self.path / name, text)
        return self.path / name

    def __str__(self) -> str:
        """The path, as one would type it."""
        return shlex.quote(str(self.path))


def create(recipe: str, options: RunOptions) -> Run:
    """A directory for a run that begins.

    Raises:
        UserError: if ``options.output`` exists and is not an empty directory, or cannot be made.
    """
    try:
        path = _numbered(RUNS / recipe) if options.output is None else _chosen(options.output, options.overwrite)
        (path / "checkpoints").mkdir(exist_ok=True)
        (path / "logs").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run's directory: {error}; choose another with --output") from None
    return Run(path)


def _numbered(parent: Path) -> Path:
    """The next free number; two commands started at once get two directories."""
    parent.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(child.name) for child in parent.iterdir() if child.name.isdecimal()), default=0)
    while True:
        path = parent / f"{number:03d}"
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
            continue
        return path


def _chosen(path: Path, overwrite: bool) -> Path:
    if path.exists() and not path.is_dir():
        raise UserError(f"--output {path} is a file; give a directory")
    path.mkdir(parents=True, exist_ok=True)
    run = Run(path)
    if any(one.name not in (_CLAIM, _RESERVE) for one in path.iterdir()):
        if not overwrite:
            raise UserError(f"--output {path} is not empty; choose another directory, or add --overwrite")
        if not run.description.is_file():
            raise UserError(f"--output {path} holds no earlier run, and --overwrite replaces only that; choose another")
        with run.claimed():
            _clear(run)
    return path


def _clear(run: Run) -> None:
    """Take away what a run has written, its description last: until then it can be told that there is one."""
    path = run.path
    try:
        products = run.products()
    except UserError:  # a broken description: the run is replaced all the same
        products = []
    figures = (path / "figures").glob("*.png")
    events = (path / "logs").glob("events.out.tfevents.*")
    for stale in (
        run.checkpoint,
        run.previous,
        run.best,
        run.metrics,
        *events,
        *(one for one in path.glob("*.json") if one != run.description),
        path / "index.html",
        *figures,
        *(path / name for name in products),
        *(path / "figures").glob("*.gif"),
        run.description,
    ):
        stale.unlink(missing_ok=True)
