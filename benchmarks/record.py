"""What every benchmark shares: interleaved timing, the machine's description, targets, and the recorded results.

A benchmark makes a few :class:`Candidate` objects, times them together with :func:`interleave`, turns the timings into
rows (plain dictionaries) and :class:`Target` objects, and hands both to :func:`record`, which writes
``results/<name>-<date>.json``, ``.md`` and ``.png``. Whether a target is met is computed here, never typed.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import argparse
import datetime
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import operator
import platform
import random
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_CORE = sorted(os.sched_getaffinity(0))[os.getpid() % len(os.sched_getaffinity(0))]
os.sched_setaffinity(
    0, {_CORE}
)  # JAX's thread pool ignores the flags above, and takes as many threads as there are cores

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "torch",
    "torchdeq",
    "xitorch",
    "torchopt",
    "theseus-ai",
    "jax",
    "jaxlib",
    "jaxopt",
    "optimistix",
    "lineax",
    "equinox",
    "numpy",
    "scipy",
    "matplotlib",
)
SAMPLE_SECONDS = 4e-3
"""A sample repeats a call until it lasts about this long, so that the clock's grain does not count."""

Row = dict[str, Any]


# --------------------------------------------------------------------------------------------------------------- timing


@dataclass(frozen=True)
class Candidate:
    """One thing to time.

    Attributes:
        run: the call that is timed; it receives what ``prepare`` made.
        prepare: makes the argument of ``run``, untimed and afresh for each call (a graph to run backward through).
    """

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: CPU time of the process (the figure that ratios are made of) and wall time.

    CPU time leaves out the moments in which other processes held the core. The process is pinned to one core, so the
    two agree on an idle machine.
    """

    cpu_ms: float
    cpu_quartiles_ms: tuple[float, float]
    wall_ms: float
    wall_quartiles_ms: tuple[float, float]
    samples: int
    calls_per_sample: int


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def sample(candidate: Candidate, calls: int) -> tuple[float, float]:
    arguments = [candidate.prepare() for _ in range(calls)]
    wall, cpu = time.perf_counter(), time.process_time()
    for argument in arguments:
        candidate.run(argument)
    return (time.perf_counter() - wall) / calls * 1e3, (time.process_time() - cpu) / calls * 1e3


def calls_per_sample(candidate: Candidate) -> int:
    """Warm the candidate up and choose how many calls make one sample."""
    for _ in range(2):
        wall, _ = sample(candidate, 1)
    return max(1, min(200, math.ceil(SAMPLE_SECONDS * 1e3 / max(wall, 1e-4))))


def interleave(
    candidates: dict[str, Candidate], repeats: int, seconds: float = math.inf, seed: int = 0
) -> dict[str, Timing]:
    """Time the candidates in rounds, each round in a new random order.

    Interleaving spreads slow spells of the machine over all candidates alike; medians and quartiles are over rounds.

    Args:
        candidates: what to time.
        repeats: the number of rounds wanted.
        seconds: a budget; rounds stop when it is spent, but never before the third.
        seed: of the order.
    """
    calls = {name: calls_per_sample(candidate) for name, candidate in candidates.items()}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    order, generator, start = list(candidates), random.Random(seed), time.perf_counter()
    for done in range(repeats):
        if done >= 3 and time.perf_counter() - start > seconds:
            break
        generator.shuffle(order)
        gc.collect()
        for name in order:
            samples[name].append(sample(candidates[name], calls[name]))
    return {name: _timing(values, calls[name]) for name, values in samples.items()}


def _timing(values: Sequence[tuple[float, float]], calls: int) -> Timing:
    wall, cpu = [v[0] for v in values], [v[1] for v in values]
    return Timing(
        statistics.median(cpu), _quartiles(cpu), statistics.median(wall), _quartiles(wall), len(values), calls
    )


# --------------------------------------------------------------------------------------------------- targets and errors


@dataclass(frozen=True)
class Target:
    """A bound that a measured value should meet."""

    name: str
    value: float | None
    relation: str
    bound: float
    passed: bool = field(init=False)

    def __post_init__(self) -> None:
        compare = {">=": operator.ge, "<=": operator.le}[self.relation]
        met = self.value is not None and math.isfinite(self.value) and compare(self.value, self.bound)
        object.__setattr__(self, "passed", bool(met))


def attempt(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """The result of ``call`` and ``None``, or ``None`` and the exception's first line."""
    try:
        return call(), None
    except Exception as error:  # a peer may raise anything; the row then shows what
        if os.environ.get("BENCH_TRACEBACK"):
            traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        cause = next(
            (line for line in lines if "EquinoxRuntimeError:" in line), lines[0]
        )  # JAX buries it in a callback's
        return None, f"{type(error).__name__}: {cause}"[:160]


# ------------------------------------------------------------------------------------------------------ what ran, where


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def machine() -> dict[str, Any]:
    """The machine and how busy it was."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "cores_used": 1,
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages compared, and the commit of this repository."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {"torchimplicit": _commit()}


def _commit() -> str:
    """The commit of the checkout, and whether the library that was imported is that commit's, file for file."""

    def git(*arguments: str) -> str:
        return subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    spec = importlib.util.find_spec("torchimplicit")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    contents = {str(path.relative_to(package.parent)): path.read_bytes() for path in sorted(package.rglob("*.py"))}
    blobs = {name: hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() for name, data in contents.items()}
    committed = {
        line.split("\t")[1]: line.split()[2] for line in git("ls-tree", "-r", "HEAD", "torchimplicit").splitlines()
    }
    digest = hashlib.sha1("".join(blobs.values()).encode()).hexdigest()[:10]
    same = blobs == {name: blob for name, blob in committed.items() if name.endswith(".py")}
    return git("rev-parse", "--short", "HEAD") + ("" if same else f" with changes (sources {digest})")


# -------------------------------------------------------------------------------------------------------------- results


def arguments(description: str, **defaults: Any) -> argparse.Namespace:
    """The command line that all benchmarks share: ``--repeats``, ``--seconds``, ``--quick``, ``--no-record``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--repeats", type=int, default=defaults.pop("repeats", 15), help="rounds of the interleaved timer"
    )
    parser.add_argument(
        "--seconds", type=float, default=defaults.pop("seconds", 60.0), help="time budget of one timed group"
    )
    parser.add_argument(
        "--quick", action="store_true", help="few rounds and only the smallest size, to see that it runs"
    )
    parser.add_argument("--no-record", action="store_true", help="print, and leave results/ alone")
    parser.add_argument("--seed", type=int, default=0)
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    options = parser.parse_args()
    if options.quick:
        options.repeats = 3
    return options


def show(value: Any) -> str:
    """A table cell."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        if value != 0 and not 1e-2 <= abs(value) < 1e4:
            return f"{value:.1e}"
        return f"{value:.3g}"
    return str(value).replace("|", "\\|")


def table(rows: Iterable[Row], columns: Sequence[str]) -> str:
    """A markdown table of some columns of the rows."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(show(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


@dataclass(frozen=True)
class Bars:
    """One panel of the figure: named groups of named bars; ``log`` for a logarithmic axis."""

    title: str
    unit: str
    groups: dict[str, dict[str, float]]
    log: bool = False
    line: float | None = None


def _draw(panels: Sequence[Bars], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [list(dict.fromkeys(name for bars in panel.groups.values() for name in bars)) for panel in panels]
    heights = [1.2 + 0.18 * len(panel.groups) * (len(bars) + 1) for panel, bars in zip(panels, names, strict=True)]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axis, panel, bars in zip(axes[:, 0], panels, names, strict=True):
        width = 0.85 / max(1, len(bars))
        for k, name in enumerate(bars):
            lengths = {i: group[name] for i, group in enumerate(panel.groups.values()) if name in group}
            places = [i + (k - (len(bars) - 1) / 2) * width for i in lengths]
            axis.barh(places, list(lengths.values()), width, label=name, color=plt.get_cmap("tab20")(k % 20))
        axis.set_yticks(range(len(panel.groups)), list(panel.groups), fontsize=8)
        axis.set(title=panel.title, xlabel=panel.unit, xscale="log" if panel.log else "linear")
        axis.invert_yaxis()
        axis.margins(y=0.01)
        if panel.line is not None:
            axis.axvline(panel.line, color="black", linewidth=0.8, linestyle="--")
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it: no NaN and no infinity."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def record(
    name: str,
    options: argparse.Namespace,
    *,
    settings: dict[str, Any],
    rows: dict[str, list[Row]],
    columns: dict[str, Sequence[str]],
    targets: Sequence[Target],
    panels: Sequence[Bars] = (),
    notes: Sequence[str] = (),
    load_before: Sequence[float] = (),
) -> None:
    """Print the tables and write the JSON, the markdown and the figure.

    Args:
        name: of the benchmark; files are ``results/<name>-<date>.*``.
        rows: tables by title; ``columns`` names the columns that the markdown shows (the JSON holds all).
        settings: what was compared, in words and numbers.
        targets: with pass or fail computed.
        notes: what a reader has to know to read the figures rightly.
    """
    now = datetime.datetime.now(datetime.UTC)
    stem = RESULTS / f"{name}-{now:%Y-%m-%d}"
    payload = {
        "name": name,
        "date": now.isoformat(timespec="seconds"),
        "command": "python " + " ".join([os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "options": vars(options),
        "seeds": [options.seed],
        "settings": settings,
        "versions": versions(),
        "machine": machine() | {"load_average_before": list(load_before)},
        "targets": [asdict(target) for target in targets],
        "notes": list(notes),
        "rows": rows,
    }
    text = _markdown(payload, columns, targets, stem.name if panels else None)
    print(text)
    if options.no_record:
        return
    RESULTS.mkdir(exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(_plain(payload), indent=1, default=str) + "\n")
    stem.with_suffix(".md").write_text(text + "\n")
    if panels:
        _draw(panels, stem.with_suffix(".png"), f"{name}, {now:%Y-%m-%d}, {payload['machine']['cpu']}, one thread")


def _markdown(
    payload: dict[str, Any], columns: dict[str, Sequence[str]], targets: Sequence[Target], figure: str | None
) -> str:
    packages = ", ".join(
        f"{name} {version}" for name, version in payload["versions"].items() if version != "not installed"
    )
    box = payload["machine"]
    parts = [
        f"# {payload['name']}, {payload['date']}",
        f"`{payload['command']}`",
        f"{box['cpu']}, {box['cores']} cores, one thread, load average {show(box['load_average'][0])}; "
        f"Python {box['python']}; {packages}.",
    ]
    parts += [f"- {key}: {value}" for key, value in payload["settings"].items()]
    if targets:
        reached = sum(target.passed for target in targets)
        cells = [
            {"target": t.name, "measured": t.value, "wanted": f"{t.relation} {t.bound:g}", "met": t.passed}
            for t in targets
        ]
        parts += [
            f"\n## Targets: {reached} of {len(targets)} met",
            table(cells, ["target", "measured", "wanted", "met"]),
        ]
    for title, names in columns.items():
        parts += [f"\n## {title}", table(payload["rows"][title], names)]
    if payload["notes"]:
        parts += ["\n## Notes", "\n".join(f"- {note}" for note in payload["notes"])]
    if figure:
        parts.append(f"\n![figure]({figure}.png)")
    return "\n\n".join(part for part in parts)
