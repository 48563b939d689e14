"""A run's directory: what it holds, and how one is made without touching another."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torchimplicit.recipes.errors import UserError
from torchimplicit.recipes.plain import to_plain

try:
    import fcntl
except ImportError:  # Windows: claims are not checked
    fcntl = None  # type: ignore[assignment]

RUNS = Path("runs")
"""Where runs go unless told otherwise, below the working directory: ``runs/<recipe>/<number>``."""

State = Literal["running", "interrupted", "complete", "diverged"]


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

    def describe(self, recipe: str, config: Any) -> None:
        """Write ``run.json`` for a run that begins."""
        self.write_json("run.json", {"recipe": recipe, "state": "running", "config": to_plain(config)})

    def mark(self, state: State) -> None:
        """Note how the run stands."""
        assert state in get_args(State)
        self.write_json("run.json", {**self.read(), "state": state})

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """No other process may train into this run meanwhile; a killed one's claim ends with it.

        Raises:
            UserError: if one does.
        """
        with (self.path / ".claim").open("w") as claim:
            if fcntl is not None:
                try:
                    fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise UserError(f"another process is training into {self}; wait for it, or stop it") from None
            yield

    def read(self) -> dict[str, Any]:
        """``run.json``.

        Raises:
            UserError: if the directory holds no run, or a broken one.
        """
        if not self.path.is_dir():
            raise UserError(f"{self.path} is no directory; give the directory of a run, such as runs/digits/001")
        if not self.description.is_file():
            raise UserError(f"{self.path} holds no run (it has no run.json); give a directory that 'train' has written")
        try:
            read = json.loads(self.description.read_text(encoding="utf-8"))
            assert isinstance(read["recipe"], str)
            assert isinstance(read["config"], dict)
            assert read["state"] in get_args(State)
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise UserError(f"{self.description} cannot be read ({error!r}); train again") from None
        return dict(read)

    def write_json(self, name: str, value: Any) -> Path:
        """Write ``value`` as strict JSON; a reader never sees half a file."""
        text = json.dumps(to_plain(value), indent=2, ensure_ascii=False, allow_nan=False)
        return self.write_text(name, text + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file that :meth:`write_json` has written."""
        return dict(json.loads((self.path / name).read_text(encoding="utf-8")))

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
        path = self.path / name
        draft = path.with_name(f".{path.name}.draft")
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
        return path

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
    if any(one.name != ".claim" for one in path.iterdir()):
        if not overwrite:
            raise UserError(f"--output {path} is not empty; choose another directory, or add --overwrite")
        if not run.description.is_file():
            raise UserError(f"--output {path} holds no earlier run, and --overwrite replaces only that; choose another")
        try:
            products = run.products()
        except UserError:  # a broken description: the run is replaced all the same
            products = []
        figures = (path / "figures").glob("*.png")
        events = (path / "logs").glob("events.out.tfevents.*")
        for stale in (
            run.checkpoint,
            run.best,
            run.metrics,
            *events,
            *path.glob("*.json"),
            path / "index.html",
            *figures,
            *(path / name for name in products),
            *(path / "figures").glob("*.gif"),
        ):
            stale.unlink(missing_ok=True)
    return path
