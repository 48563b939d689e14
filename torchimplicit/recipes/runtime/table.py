"""A published table in one file: its runs as rows of data, and sheets, claims, notes and figures as views of them.

A table names its :class:`Job` objects, each under a key such as its row and its seed. Sheets, claims and
notes are made only from what the record holds of every run, under the job's name: a record remakes itself.
Drawings may also look into the runs' folders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from torchimplicit.recipes.runtime.run import Environment
from torchimplicit.recipes.runtime.settings import from_plain, not_negative, positive, to_plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console

    from torchimplicit.recipes.runtime.run import Run

# -- A table as plain data, drawn by the terminal and by the page alike ------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column's heading.

    Attributes:
        title: short.
        unit: unit of its figures; empty for none.
        note: what the figures are, in one sentence.
    """

    title: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text under columns; the first column names the row."""

    columns: list[Column]
    rows: list[list[str]]

    def rich(self) -> RichTable:
        """The table for the terminal, transposed (a column for each row) to fit 80 characters."""
        table = RichTable()
        head, *figures = self.columns
        table.add_column(head.title)
        for row in self.rows:
            table.add_column(Text(row[0], overflow="fold"), justify="right")
        for index, column in enumerate(figures, start=1):
            name = column.title + (f" ({column.unit})" if column.unit else "")
            table.add_row(Text(name), *(Text(row[index]) for row in self.rows))
        return table

    def rich_rows(self, width: int) -> Group:
        """The table for a terminal of that width, not transposed; if it is too wide, in parts that all begin with the
        first column."""
        head, *figures = range(len(self.columns))
        wide = {index: self._width(index) for index in figures}
        first = min(max(len(row[head]) for row in [*self.rows, [self.columns[head].title]]), 2 * width // 5) + 4
        parts: list[list[int]] = [[]]
        for index in figures:
            if parts[-1] and first + sum(wide[other] for other in [*parts[-1], index]) > width:
                parts.append([])
            parts[-1].append(index)
        return Group(*(self._part([head, *part]) for part in parts))

    def _width(self, index: int) -> int:
        """Characters that a column needs, with its frame: no cell is cut, and titles and sentences break between
        their words."""
        column = self.columns[index]
        cells = [word for row in self.rows for word in (row[index].split() if len(row[index]) > 40 else [row[index]])]
        return 3 + max(map(len, [*column.title.split(), column.unit, *cells]))

    def _part(self, chosen: Sequence[int]) -> RichTable:
        table = RichTable()
        for place, index in enumerate(chosen):
            column = self.columns[index]
            name = column.title + (f"\n{column.unit}" if column.unit else "")
            # a name that is cut short may be that of several rows
            least = self._width(index) - 3 if place else None
            table.add_column(name, justify="right" if place else "left", overflow="fold", min_width=least)
        for row in self.rows:
            table.add_row(*(Text(row[index]) for index in chosen))
        return table

    def markdown(self) -> str:
        """The table as Markdown."""
        heads = [c.title + (f" ({c.unit})" if c.unit else "") for c in self.columns]
        lines = [heads, ["---", *("---:" for _ in heads[1:])], *self.rows]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        notes = "\n".join(f"- **{c.title}**: {c.note}" for c in self.columns if c.note)
        return table + (f"\n\n{notes}" if notes else "")


NONE = "–"
"""A cell without a figure."""

C = TypeVar("C")
T = TypeVar("T")


# -- what a table asks for, and what it comes to -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Runs of a table, and where they are executed."""

    seeds: int = 3
    """Number of runs per row, each with its own seed."""

    first_seed: int = 0
    """First seed; the others follow it."""

    scale: Literal["cpu", "paper"] = "cpu"
    """cpu: settings that take minutes per row on one core. paper: the published settings, for GPUs."""

    parallel: int = 1
    """Number of runs at the same time."""

    together: int = 1
    """Number of runs per process, one after the other. Saves start-up time if runs are short."""

    cluster: Literal["local", "slurm"] = "local"
    """Where the runs are executed: processes on this machine, or Slurm jobs."""

    partition: str | None = None
    """Slurm partition. Default: the cluster's."""

    hours: float = 24.0
    """Time limit of a run, in hours. A run that is started again continues from its last checkpoint."""

    record: Path | None = None
    """Also copy the record and its figures to a folder with the table's name inside this one."""

    def __post_init__(self) -> None:
        positive(self, "seeds", "parallel", "together", "hours")
        not_negative(self, "first_seed")

    @property
    def all_seeds(self) -> range:
        """The seeds."""
        return range(self.first_seed, self.first_seed + self.seeds)


@dataclass(frozen=True)
class Job:
    """One run of a table.

    Attributes:
        name: unique in the table, fit for a folder.
        recipe: in the registry.
        config: its settings.
        key: which run of the table it is, such as its row and its seed.
        recorded: the name in the record, where it is another; ``group/name`` for one within a group.
    """

    name: str
    recipe: str
    config: Any
    key: Mapping[str, Any] = field(default_factory=dict)
    recorded: str = ""

    def __post_init__(self) -> None:
        if not self.recorded:
            object.__setattr__(self, "recorded", self.name)


@dataclass(frozen=True)
class Claim:
    """A statement that was tested.

    Attributes:
        statement: in words, with the figure aimed at.
        measured: what came out, in words.
        holds: whether it holds here; ``None`` where what was measured cannot tell, such as a remedy where nothing ails.
    """

    statement: str
    measured: str
    holds: bool | None

    @property
    def verdict(self) -> str:
        """The verdict, as text."""
        return "Not tested" if self.holds is None else "Holds" if self.holds else "Fails"


@dataclass(frozen=True)
class Picture:
    """A figure of the record.

    Attributes:
        file: beside the record.
        caption: what it shows and how to read it.
    """

    file: str
    caption: str


@dataclass(frozen=True)
class TitledTable:
    """A table of the record with its title."""

    title: str
    table: Table


@dataclass(frozen=True)
class Record:
    """A reproduction.

    Attributes:
        name: name of the table.
        title: title to display.
        source: what is reproduced: paper, table or figure.
        protocol: what was run and how the figures were selected, in a few sentences.
        sheets, claims, pictures: what came out; a published number stands beside ours.
        notes: what else a reader must know, such as what falls short and why.
        command: that made it.
        seconds: seconds of all runs together.
        environment: on what.
        settings: settings of the table.
        runs: figures of every single run, by its name.
    """

    name: str
    title: str
    source: str
    protocol: str
    sheets: list[TitledTable]
    claims: list[Claim]
    pictures: list[Picture]
    notes: list[str]
    command: str
    seconds: float
    environment: Environment
    settings: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, Any] = field(default_factory=dict)


def spread(values: Sequence[float], digits: int = 1, scale: float = 1.0) -> str:
    """Mean and standard deviation over seeds, for a table's cell: ``85.0 ± 0.2``; a dash if there are none."""
    if not values:
        return "–"
    mean = f"{scale * fmean(values):.{digits}f}"
    return f"{mean} ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else mean


@dataclass(frozen=True)
class CaptionedFigure:
    """A figure with its file name and caption."""

    name: str
    figure: Figure
    caption: str


@dataclass(frozen=True)
class Summary:
    """The summary that a table makes of its runs; see :class:`~.record.Record`."""

    title: str
    source: str
    protocol: str
    sheets: list[TitledTable]
    claims: list[Claim]
    drawings: list[CaptionedFigure]
    notes: list[str]
    runs: dict[str, Any]


# -- the runs ----------------------------------------------------------------------------------------------------------


def look(figures: Any, path: str, between: str = ".") -> Any:
    """The figure at ``path``, keys joined by dots; ``None`` if there is none."""
    for key in path.split(between):
        if not isinstance(figures, Mapping):
            return None
        figures = figures.get(key)
    return figures


@dataclass(frozen=True)
class Line:
    """One run: its name, its key, and its part of the record."""

    name: str
    key: Mapping[str, Any]
    figures: Any

    def __getitem__(self, path: str) -> Any:
        return self.key[path] if path in self.key else look(self.figures, path)

    @property
    def named(self) -> str:
        """Its row and seed, for display."""
        row = self["row"]
        return f"{getattr(row, 'name', row)}, seed {self['seed']}"

    @property
    def at_best(self) -> Mapping[str, Any] | None:
        """The validation that selected the tested weights."""
        step = self["best.step"]
        return next((v for v in self["validations"] or () if v["step"] == step), None)


class Runs(Sequence[Line]):
    """The runs that are finished, in the order of the jobs."""

    def __init__(self, lines: Iterable[Line]):
        self._lines = list(lines)

    @classmethod
    def made_by(cls, jobs: Iterable[Job], figures: Mapping[str, Any]) -> Runs:
        """The runs of those jobs for which ``figures`` returns something."""
        looked = ((job, look(figures, job.recorded, "/")) for job in jobs)
        return cls(Line(job.name, job.key, one) for job, one in looked if one is not None)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: Any) -> Any:
        return self._lines[index]

    def __iter__(self) -> Iterator[Line]:
        return iter(self._lines)

    def where(self, **key: Any) -> Runs:
        """The runs with this key."""
        return Runs(line for line in self if all(name in line.key and line.key[name] == key[name] for name in key))

    def named(self, name: str) -> Mapping[str, Any]:
        """The record's part of one run; empty if it is missing."""
        return next((line.figures for line in self if line.name == name), {})

    def of(self, row: Any, path: str) -> list[Any]:
        """A figure of every run of a row that has it."""
        return self.where(row=row).column(path)

    def column(self, path: str) -> list[Any]:
        """A figure of every run that has it."""
        return [value for line in self if (value := line[path]) is not None]

    def at_best(self, path: str) -> list[Any]:
        """A figure of the validations that selected the tested weights."""
        return [best[path] for line in self if (best := line.at_best) is not None]

    def told(self, path: str, digits: int = 1, scale: float = 1.0) -> Callable[[Any], str]:
        """The cell of a row: mean and standard deviation of a figure over its runs."""
        return lambda row: spread(self.of(row, path), digits, scale)

    def first(self, path: str) -> Callable[[Any], str]:
        """The cell of a row: a figure that is the same for all its runs, such as the number of parameters."""
        return lambda row: str((self.of(row, path) or [NONE])[0])

    def couples(self, row: Any, other: Any) -> list[tuple[Line, Line]]:
        """The pairs of runs of two rows whose keys are otherwise equal."""

        def rest(line: Line) -> frozenset[Any]:
            return frozenset((name, value) for name, value in line.key.items() if name != "row")

        theirs = {rest(line): line for line in self.where(row=other)}
        return [(line, theirs[rest(line)]) for line in self.where(row=row) if rest(line) in theirs]

    def paired(self, row: Any, other: Any, path: str) -> list[tuple[Any, Any]]:
        """A figure of both rows, for all pairs that have it."""
        both = ((a[path], b[path]) for a, b in self.couples(row, other))
        return [(a, b) for a, b in both if a is not None and b is not None]

    def gaps(self, row: Any, other: Any, path: str) -> list[float]:
        """The differences of such pairs."""
        return [a - b for a, b in self.paired(row, other, path)]

    def reaching(self, row: Any, other: Any, figure: str) -> list[tuple[int | None, int]]:
        """For each pair: the steps after which a run first reaches the other's best validation (``None`` if never), for
        a figure of which more is better, and the steps the other took."""
        return [
            (
                next((v["step"] for v in ours["validations"] if v[figure] >= theirs[f"best.{figure}"]), None),
                theirs["best.step"],
            )
            for ours, theirs in self.couples(row, other)
            if theirs["best"] is not None
        ]


def trained(config: Any, run: Run) -> dict[str, Any] | None:
    """The content of ``results.json`` as records hold it; ``None`` if there is none."""
    if not (run.path / "results.json").is_file():
        return None
    one = run.read_json("results.json")

    def flat(validation: Any) -> Any:
        return {"step": validation["step"], "seconds": validation["seconds"], **validation["figures"]}

    return {
        "state": one["state"],
        "test": one["test"] and one["test"]["figures"],
        "best": one["best"] and flat(one["best"]),
        "parameters": one["parameters"],
        "costs": one["costs"],
        "steps": one["steps"],
        "seconds": one["seconds"],
        "validations": [flat(v) for v in one["validations"]],
    }


def read(name: str) -> Callable[[Any, Run], dict[str, Any] | None]:
    """Figures that are read from this JSON file of a run."""

    def figures(config: Any, run: Run) -> dict[str, Any] | None:
        return run.read_json(name) if (run.path / name).is_file() else None

    return figures


def by_name(**others: Callable[[Any, Run], dict[str, Any] | None]) -> Callable[[Any, Run], dict[str, Any] | None]:
    """Figures of trainings, and of runs with these names in another way."""
    return lambda config, run: others.get(run.path.name, trained)(config, run)


# -- cells and sheets --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell(Generic[T]):
    """A column, and the function that makes its cell for a row."""

    title: str
    of: Callable[[T], str]
    unit: str = ""
    note: str = ""


def sheet(title: str, rows: Iterable[T], cells: Iterable[Cell[T]], below: Iterable[Sequence[str]] = ()) -> TitledTable:
    """A table of the rows; lines of text ``below`` are padded with dashes."""
    shown = list(cells)
    columns = [Column(one.title, one.unit, one.note) for one in shown]
    last = [[*line, *[NONE] * (len(shown) - len(line))] for line in below]
    return TitledTable(title, Table(columns, [*([one.of(row) for one in shown] for row in rows), *last]))


def shown(value: Any, form: str) -> str:
    """The value in this format; a dash if there is none."""
    return NONE if value is None else format(value, form)


def mean(values: Iterable[Any], form: str) -> str:
    """The mean in this format; a dash if there are no values."""
    there = list(values)
    return format(fmean(there), form) if there else NONE


# -- claims and notes that many tables make ----------------------------------------------------------------------------


def sooner(
    statement: str, tries: Sequence[tuple[int | None, int]], ours: float | None, other: float | None
) -> Iterator[Claim]:
    """Test whether one reaches the other's final quality in less time, given :meth:`Runs.reaching` and the seconds per
    step of both; no claim if these are unknown."""
    if not tries or ours is None or other is None:
        return
    reached = [(ours * steps, other * theirs) for steps, theirs in tries if steps is not None]
    if not reached:
        yield Claim(statement, f"it never reaches that quality, in {len(tries)} runs", False)
        return
    mine, its = (fmean(seconds) for seconds in zip(*reached, strict=True))
    yield Claim(
        statement,
        f"it reaches that quality in {len(reached)} of {len(tries)} runs, on average after {mine:.1f} s instead of "
        f"{its:.1f} s",
        len(reached) == len(tries) and mine < its,
    )


def still_rising(runs: Runs) -> Iterator[str]:
    """The note about trainings that had not converged; empty if all had."""
    done = [line for line in runs if line["validations"] is not None]
    last = [line["steps"] or line["validations"][-1]["step"] for line in done]
    if rising := sum(line["best.step"] == step for line, step in zip(done, last, strict=True)):
        yield (
            f"In {rising} of {len(done)} runs the last validation was the best: longer training would improve these "
            "runs, though not all by the same amount."
        )


def diverged(runs: Runs, name: Callable[[Line], str] = lambda line: line.named) -> Iterator[str]:
    """The note about diverged runs; empty if there are none."""
    if names := [name(line) for line in runs if line["state"] == "diverged"]:
        yield f"These runs diverged: {', '.join(names)}."


def missing(jobs: Iterable[Job], runs: Runs, words: str = "These runs are missing or did not finish") -> Iterator[str]:
    """The note about jobs missing from the record; empty if there are none."""
    if names := [job.name for job in jobs if not runs.named(job.name)]:
        yield f"{words}: {', '.join(names)}."


def left_out(jobs: Iterable[Job], runs: Runs, words: str) -> Iterator[str]:
    """The note about how many jobs are missing, with the names of the first."""
    asked = list(jobs)
    if names := [job.name for job in asked if not runs.named(job.name)]:
        more = ", ..." if len(names) > 6 else ""
        yield f"{len(names)} of {len(asked)} runs are {words}: {', '.join(names[:6])}{more}."


def band(panel: Axes, x: Sequence[float], values: Sequence[Sequence[float]], label: str, look: dict[str, Any]) -> None:
    """Draw the mean of several values at every point, in a band from minimum to maximum."""
    panel.plot(x, [fmean(each) for each in values], label=label, **look)
    low, high = ([end(each) for each in values] for end in (min, max))
    panel.fill_between(x, low, high, color=look["color"], alpha=0.13, linewidth=0)


def curves(panel: Axes, series: Iterable[tuple[str, Runs, Mapping[str, Any]]], figure: str, scale: float = 1.0) -> None:
    """Draw a figure of the validations during training: for every label its mean over the runs, as far as all of them
    went."""
    for label, runs, look in series:
        together = list(zip(*(line["validations"] for line in runs if line["validations"]), strict=False))
        if together:
            values = [scale * fmean(v[figure] for v in each) for each in together]
            panel.plot([each[0]["step"] for each in together], values, label=label, **look)
    panel.set_xlabel("steps")
    if panel.has_data():
        panel.legend()


# -- the table ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Published(Generic[C]):
    """A table: the jobs of its settings, and what their runs show.

    Its module has functions of these names, which :func:`published` takes.

    Attributes:
        title, source: title and source of the record.
        jobs: jobs of the settings.
        figures: what the record holds of a run: plain data, or ``None``.
        protocol: what was run, in words.
        sheets, claims, notes: lists, or generators, out of the settings and the runs that are there, and nothing else.
        drawings: likewise, and out of the runs' folders by the jobs' names.
    """

    title: str | Callable[[C], str]
    source: str
    jobs: Callable[[C], list[Job]]
    protocol: Callable[[C, Runs], str]
    sheets: Callable[[C, Runs], Iterable[TitledTable]]
    claims: Callable[[C, Runs], Iterable[Claim]]
    notes: Callable[[C, Runs], Iterable[str]]
    drawings: Callable[[C, Runs, Mapping[str, Run]], Iterable[CaptionedFigure]]
    figures: Callable[[C, Run], Any] = trained

    def gather(self, config: C, folders: Mapping[str, Run]) -> dict[str, Any]:
        """The record's part of these runs."""
        there = (job for job in self.jobs(config) if job.name in folders)
        figures = {job.recorded: self.figures(config, folders[job.name]) for job in there}
        packed: dict[str, Any] = {}
        for name, one in figures.items():
            group, _, within = name.rpartition("/")
            if one is not None:
                (packed.setdefault(group, {}) if group else packed)[within] = to_plain(one)
        return packed

    def summarize(self, config: C, folders: Mapping[str, Run]) -> Summary:
        """See :class:`~torchimplicit.recipes.runtime.table.Summary`."""
        figures = self.gather(config, folders)
        runs = Runs.made_by(self.jobs(config), figures)
        return Summary(
            title=self.title if isinstance(self.title, str) else self.title(config),
            source=self.source,
            protocol=self.protocol(config, runs),
            sheets=list(self.sheets(config, runs)),
            claims=list(self.claims(config, runs)),
            drawings=list(self.drawings(config, runs, folders)),
            notes=list(self.notes(config, runs)),
            runs=figures,
        )

    def remade(self, kind: type[C], record: Record) -> tuple[list[TitledTable], list[Claim], list[str]]:
        """Remake sheets, claims and notes from a record's own settings and runs."""
        config = from_plain(kind, record.settings)
        runs = Runs.made_by(self.jobs(config), record.runs)
        return [*self.sheets(config, runs)], [*self.claims(config, runs)], [*self.notes(config, runs)]

    def check(self, config: C) -> None:
        from torchimplicit.recipes.runtime import jobs

        jobs.check(self, config)

    def train(self, config: C, run: Run, console: Console) -> bool:
        from torchimplicit.recipes.runtime import jobs

        return jobs.train(self, config, run, console)

    def evaluate(self, config: C, run: Run, console: Console) -> None:
        from torchimplicit.recipes.runtime import jobs

        jobs.evaluate(self, config, run, console)


def published(module: Mapping[str, Any], title: str | Callable[[Any], str], source: str, **more: Any) -> Published[Any]:
    """The table made of a module's functions, given its ``globals()``; ``figures`` may be given or absent."""
    names = ("jobs", "protocol", "sheets", "claims", "notes", "drawings", "figures")
    return Published(title=title, source=source, **{name: module[name] for name in names if name in module} | more)
