"""A run's directory: its contents, its runner, and its environment."""

from __future__ import annotations

import os
import pkgutil
import platform
import shlex
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

import torch
from filelock import FileLock, Timeout

from torchimplicit import gradients, linear, models, solvers
from torchimplicit.errors import ConvergenceWarning
from torchimplicit.gradients import Gradient
from torchimplicit.linear import LinearSolver
from torchimplicit.recipes.runtime import files
from torchimplicit.recipes.runtime.errors import StorageError, UserError
from torchimplicit.recipes.runtime.files import say_once
from torchimplicit.recipes.runtime.settings import to_plain
from torchimplicit.solvers import Solver

if TYPE_CHECKING:
    from rich.console import Console

# -- The library's own defaults, as they were when a run began ---------------------------------------------------------
#
# A recipe's settings name what a person may choose; what they do not name, such as the memory of Anderson's method,
# is a
# default of the library. A run notes all of them, and goes on with what it noted when the library has others by then.


_ROOMS = (solvers, linear, gradients, models)

Defaults = dict[str, dict[str, Any]]
"""Fields with a default value, by the strategy's name."""


def present() -> Defaults:
    """The defaults of this version, as plain values. Fields with a default factory are left out, as their contents are
    covered."""
    return {name: to_plain(_plain_defaults(kind), exact=True) for name, kind in _strategies().items()}


@contextmanager
def of_run(noted: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Make strategies with the defaults that a run recorded; report changes and removed fields once.

    A default that has changed since is reported once, and so is a field that does not exist any more.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []
    strategies = _strategies()
    try:
        for name, known in noted.items():
            now = _plain_defaults(strategies[name]) if name in strategies else {}
            for field, value in known.items():
                was = _tuples(value)
                if field not in now:
                    say_once(f"the run had {name}({field}={was!r}), which this version does not know")
                elif to_plain(now[field], exact=True) != value:
                    say_once(f"this version has {name}({field}={now[field]!r}); the run keeps its own, {was!r}")
                    table: dict[str, Any] = strategies[name].__init__.__kwdefaults__  # type: ignore[misc]
                    before.append((table, field, table[field]))
                    table[field] = was
                    _check(strategies[name])
        yield
    finally:
        for table, field, value in reversed(before):
            table[field] = value


def _check(kind: type) -> None:
    """Raise where a strategy refuses the defaults that it now has.

    Raises:
        UserError: it does.
    """
    required = [one for one in fields(kind) if one.init and one.default is MISSING and one.default_factory is MISSING]
    if not required:
        try:
            kind()
        except (TypeError, ValueError) as error:
            raise UserError(f"run.json was changed by hand: {error}") from None


@cache
def _strategies() -> dict[str, type]:
    """The frozen dataclasses with keyword-only defaults: solvers, linear solvers, estimators, and models' configs."""
    strategies: dict[str, type] = {}
    for room in _ROOMS:
        for module in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
            for name, kind in vars(import_module(module.name)).items():
                if isinstance(kind, type) and is_dataclass(kind) and kind.__module__ == module.name:
                    wanted = issubclass(kind, Solver | LinearSolver | Gradient) or name.endswith("Config")
                    if wanted and kind.__init__.__kwdefaults__:
                        strategies[name] = kind
    return strategies


def _plain_defaults(kind: type) -> dict[str, Any]:
    table: dict[str, Any] = kind.__init__.__kwdefaults__  # type: ignore[misc]
    return {name: value for name, value in table.items() if isinstance(value, int | float | str | tuple | None)}


def _tuples(value: Any) -> Any:
    """Convert lists to tuples and names to non-finite numbers, which JSON lacks."""
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    return float(value) if value in ("inf", "-inf", "nan") else value


# -- On what a run was made --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Environment:
    """Software, hardware and time of a run."""

    torchimplicit_version: str
    torch_version: str
    python_version: str
    system: str
    device: str
    cores: int
    threads: int
    date: str

    @staticmethod
    def of(device: torch.device) -> Environment:
        """The environment of this process, training on ``device``."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return Environment(
            torchimplicit_version=version(),
            torch_version=str(torch.__version__),
            python_version=platform.python_version(),
            system=f"{platform.system()} {platform.release()}",
            device=name,
            cores=cores,
            threads=torch.get_num_threads(),
            date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )


def version() -> str:
    """The library's version."""
    try:
        return metadata.version("torchimplicit")
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "source tree"


# -- The device and the threads that a recipe asks for -----------------------------------------------------------------


DeviceName = Literal["auto", "cpu", "cuda"]


def device(name: DeviceName, count: int = 1) -> torch.device:
    """The device to train on; ``auto`` takes a GPU if there is one.

    Raises:
        UserError: if a GPU is asked for and there is none, or fewer GPUs or CPU cores than ``count``.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device cuda: PyTorch finds no CUDA device here; use --device cpu, or install a CUDA build")
    chosen = torch.device("cuda" if available and name != "cpu" else "cpu")
    if chosen.type == "cuda" and count > torch.cuda.device_count():
        raise UserError(f"--devices {count}: PyTorch finds {torch.cuda.device_count()} CUDA devices here")
    if chosen.type == "cpu" and count > (cores := os.cpu_count() or 1):
        raise UserError(f"--devices {count}: this machine has {cores} CPU cores, and each process needs one")
    return chosen


def clock(where: torch.device, *, wall: bool = False) -> Callable[[], float]:
    """A function that waits for the device and reads the time, in seconds.

    On a CPU it is the time of this process, which other processes do not lengthen; on a GPU, or with ``wall``, that of
    the wall.
    """
    if where.type != "cuda":
        return time.perf_counter if wall else time.process_time

    def read() -> float:
        torch.cuda.synchronize(where)
        return time.perf_counter()

    return read


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch's number of CPU threads, while the context lasts; 0 leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quietly() -> Iterator[None]:
    """Record solves that stop at their budget without warning about them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


# -- A run's directory: what it holds, and how one is made without touching another ------------------------------------


RUNS = Path("runs")
"""Default location of runs, relative to the working directory: ``runs/<recipe>/<number>``."""

NOTED_EVERY = 2.0
"""Seconds between two records of a run's progress on disk."""

State = Literal["running", "interrupted", "complete", "diverged"]

_CLAIM, _RESERVE = ".claim", ".reserve"
_RESERVED = 1 << 17
"""Bytes that a run reserves, so that on a full disk it can still record how it ended."""


@dataclass(frozen=True)
class RunOptions:
    """Location of the run."""

    output: Path | None = None
    """Directory of the run, which must be new or empty. Default: the next free number in runs/<recipe>/."""

    overwrite: bool = False
    """Replace an earlier run in --output. Files that do not belong to a run are kept."""


@dataclass(frozen=True)
class Run:
    """One training run on disk.

    The directory holds ``run.json`` (the recipe, its settings and how far it came), ``checkpoints/last.ckpt``,
    ``logs/metrics.csv`` and whatever the recipe writes.
    """

    path: Path

    @property
    def description(self) -> Path:
        """Path of the file with recipe, settings and state."""
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
                "defaults": present(),
            },
        )

    def mark(self, state: State, reason: str = "") -> None:
        """Record the run's state, and the reason if it has stopped."""
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
        """Lock the run against other processes; a killed process releases its lock.

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
            raise UserError(f"{self.path} is not a directory; give the directory of a run, such as runs/digits/001")
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
        """Write ``value`` as strict JSON with its checksum, atomically."""
        files.write_json(self.path / name, to_plain(value))
        return self.path / name

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file that :meth:`write_json` has written.

        Raises:
            DamagedFileError: it is not what was written.
        """
        return files.read_json(self.path / name)

    def advance(self, draft: Path) -> None:
        """Make a complete new checkpoint the last one, keeping the previous one."""
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
        """Path for a file beside the page and the figures, registered as the run's own and reported."""
        known = self.products()
        if name not in known:
            self.write_json("run.json", {**self.read(), "products": [*known, name]})
        return self.path / name

    def products(self) -> list[str]:
        """The names that :meth:`product` was asked for."""
        return list(self.read().get("products", []))

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file of the run, atomically."""
        files.write_text(self.path / name, text)
        return self.path / name

    def __str__(self) -> str:
        """The path, as typed on a command line."""
        return shlex.quote(str(self.path))


def create(recipe: str, options: RunOptions) -> Run:
    """Create the directory of a new run.

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
    """Delete what a run has written, its description last so that it remains recognizable until then."""
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


# -- What a recipe consists of: settings, and a runner for them --------------------------------------------------------


class Runner(Protocol):
    """Runs a recipe's settings: a module, or an object.

    The settings are a frozen dataclass, each field with a docstring that ``--help`` shows. Settings that make no sense
    raise :class:`~torchimplicit.recipes.runtime.errors.UserError` when they are made. Their module imports nothing
    heavy: the command line makes settings only to show their help.
    """

    def check(self, config: Any) -> None:
        """Raise :class:`~torchimplicit.recipes.runtime.errors.UserError` if this machine cannot run it."""

    def train(self, config: Any, run: Run, console: Console) -> bool:
        """Train, from the run's last checkpoint if it has one, and write the results into the run's directory.

        Returns:
            Whether training went to its end. ``False``: it was interrupted, and what was done is written.
        """

    def evaluate(self, config: Any, run: Run, console: Console) -> None:
        """Measure again from what the run holds, and write ``evaluation.json``."""


@runtime_checkable
class Distributed(Protocol):
    """A runner that can train one run in several processes."""

    def follow(self, config: Any, run: Run) -> None:
        """Take part in the training that the process of rank 0 leads, and write nothing."""


@runtime_checkable
class Exporter(Protocol):
    """A runner that can sample what a run has learnt at another resolution."""

    def export(self, config: Any, sizes: tuple[int, ...], run: Run, console: Console) -> Path:
        """Write it into the run's directory.

        Args:
            config: the run's.
            sizes: as typed; the recipe says what they mean.
            run: where the weights are.
            console: for progress.

        Returns:
            the file.

        Raises:
            UserError: if there are no weights yet, or the sizes make no sense.
        """
