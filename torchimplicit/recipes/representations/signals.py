"""Table: a sound and a video by implicit and explicit representations (Huang et al. 2021, (Implicit)²)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from torchimplicit.recipes.representations.audio import PAPER_SCALE_A_SECOND, SoundConfig, audio
from torchimplicit.recipes.representations.cost import COST, FieldCostConfig, parameters, seconds_of, trained
from torchimplicit.recipes.representations.fit import FILTERS, NAMES, FilterKind, Representation, full_batch
from torchimplicit.recipes.representations.video import VideoConfig, video
from torchimplicit.recipes.runtime import table
from torchimplicit.recipes.runtime.page import axes, style
from torchimplicit.recipes.runtime.settings import Machine, known_rows, positive
from torchimplicit.recipes.runtime.step_cost import step_sheet
from torchimplicit.recipes.runtime.table import CaptionedFigure, Cell, Claim, Job, Plan, Runs, TitledTable

if TYPE_CHECKING:
    from torch import Tensor

    from torchimplicit.recipes.runtime.run import Run

Kind = Literal["sound", "video"]
KINDS: tuple[Kind, ...] = ("sound", "video")
SHOWN: FilterKind = "fourier"
"""The filter whose fits are shown."""

PUBLISHED_VIDEO = {"siren": (26.03, 25.12), "fourier": (25.85, 24.97), "gabor": (26.45, 26.15)}
"""Huang et al. 2021: PSNR of the video in dB, for implicit and explicit models with one layer of width 1024."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row: one model of one signal."""

    kind: Kind
    filter: FilterKind
    implicit: bool

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.kind}-{self.filter}-{'implicit' if self.implicit else 'explicit'}"

    @property
    def label(self) -> str:
        """The row's label."""
        return NAMES[self.filter, self.implicit]

    @property
    def twin(self) -> Row:
        """The explicit model with the same number of parameters."""
        return replace(self, implicit=False)


ROWS = {r.name: r for r in (Row(kind=k, filter=f, implicit=i) for k in KINDS for f in FILTERS for i in (True, False))}


@dataclass(frozen=True, kw_only=True)
class SignalsConfig:
    """Three filters, implicit and explicit, on a sound and a video."""

    plan: Plan = field(default_factory=lambda: Plan(seeds=2, together=12))

    sound_file: Path | None = None
    """A WAV file. Default: a synthesized melody."""

    video_file: Path | None = None
    """A video in any format of implicit-video. Default: moving shapes, drawn on the spot."""

    sound_from: float = 0.0
    """Start of the excerpt of --sound-file, in seconds."""

    sound_seconds: float | None = None
    """Length of the excerpt, in seconds. Default: 2, or the whole file with --scale paper."""

    sound_rate: int | None = None
    """Samples per second. Default: 8000, or the paper's 44,100 with --scale paper."""

    video_frames: int | None = None
    """Number of frames. Default: 10, or the whole file with --scale paper."""

    video_size: int | None = None
    """Longest side in pixels. Default: 48, or 512 with --scale paper."""

    width: int | None = None
    """Width of the models. Default: 64; with --scale paper 256 for the sound and 1024 for the video."""

    steps: int | None = None
    """Optimizer steps of each training. Default: 400; with --scale paper 3000 for the sound and 10,000 for the
    video."""

    rows: tuple[str, ...] = ()
    """Rows to run, such as sound-fourier-implicit, video-gabor-explicit and cost. Default: all."""

    machine: Machine = field(default_factory=lambda: Machine(tensorboard=False))

    def __post_init__(self) -> None:
        positive(self, "sound_seconds", "sound_rate", "video_frames", "video_size", "width", "steps")


def heard(config: SignalsConfig, row: Row, seed: int) -> SoundConfig:
    """One fit of the sound."""
    paper = config.plan.scale == "paper"
    whole = paper and config.sound_file is not None
    steps = config.steps or (3000 if paper else 400)
    width = config.width or (256 if paper else 64)
    seconds = config.sound_seconds or (None if whole else 7.0 if paper else 2.0)
    published = PAPER_SCALE_A_SECOND * (seconds or 7.0) if paper else None
    return replace(
        audio(),
        file=config.sound_file,
        start=config.sound_from,
        seconds=seconds,
        rate=config.sound_rate or (44100 if paper else 8000),
        representation=Representation(filter=row.filter, implicit=row.implicit, width=width, frequencies=published),
        optimization=replace(full_batch(steps, max(1, steps // 8)), seed=seed),
        machine=config.machine,
    )


def seen(config: SignalsConfig, row: Row, seed: int) -> VideoConfig:
    """One fit of the video."""
    paper = config.plan.scale == "paper"
    whole = paper and config.video_file is not None
    steps = config.steps or (10000 if paper else 400)
    model = Representation(filter=row.filter, implicit=row.implicit, width=config.width or (1024 if paper else 64))
    return replace(
        video(),
        file=config.video_file,
        frames=config.video_frames or (None if whole else 250 if paper else 10),
        size=config.video_size or (512 if paper else 48),
        # the states of every pixel of a long video have no room
        representation=replace(model, amortize="off", frequencies=128.0) if paper else model,
        optimization=replace(full_batch(steps, max(1, steps // 8)), seed=seed, batch_size=65536),
        machine=config.machine,
    )


def jobs(config: SignalsConfig) -> list[Job]:
    """All jobs, seed by seed so that a slow phase of the machine affects all rows; the costs after the first seed."""
    known_rows(config.rows, (*ROWS, COST))
    planned: list[Job] = []
    for seed in config.plan.all_seeds:
        sounds, videos = (
            {name: fit(config, row, seed) for name, row in ROWS.items() if row.kind == kind}
            for kind, fit in (("sound", heard), ("video", seen))
        )
        for recipe, fits in (("implicit-audio", sounds), ("implicit-video", videos)):
            for name, one in fits.items():
                planned.append(Job(f"{name}-seed{seed}", recipe, one, {"row": ROWS[name], "seed": seed}))
        if seed == config.plan.first_seed:
            costs = FieldCostConfig(
                names=(*sounds, *videos),
                sounds=tuple(sounds.values()),  # type: ignore[arg-type]
                videos=tuple(videos.values()),  # type: ignore[arg-type]
                warm_steps=10,
                rounds=7,
                steps_a_turn=1,
            )
            planned.append(Job(COST, "fields-cost", costs))
    return [job for job in planned if not config.rows or job.name.partition("-seed")[0] in config.rows]


def sheets(config: SignalsConfig, runs: Runs) -> Iterator[TitledTable]:
    """The quality of each signal, and the cost of a step."""

    def evaluations(row: Row) -> str:
        counted = runs.of(row, "costs.forward")
        return table.mean(counted, ".2f") if row.implicit else "1" if counted else table.NONE

    cells = [
        Cell[Row]("Model", lambda row: row.label),
        parameters(runs),
        Cell("PSNR", runs.told("test.PSNR", 2), "dB",
             "PSNR of all points with the weights of the best validation, mean ± standard deviation over the seeds."),
        Cell("SNR", runs.told("test.SNR", 2), "dB",
             "Signal-to-noise ratio: the power of the sound over that of the error, with the same weights."),
        Cell("Published", lambda row: f"{PUBLISHED_VIDEO[row.filter][not row.implicit]:.2f}", "dB",
             "Published PSNR of models of width 1024 on another video of another size."),
        Cell("Gain",
             lambda row: table.mean(runs.gaps(row, row.twin, "test.PSNR") if row.implicit else [], "+.2f"), "dB",
             "PSNR less that of the explicit model with the same filter, mean over the seeds."),
        Cell("Evaluations", evaluations, "",
             "Evaluations of the cell in a training step, mean over the steps: one, except for the solves after "
             "validations."),
        trained(runs),
    ]  # fmt: skip
    for kind, lacking in (("sound", "Published"), ("video", "SNR")):
        rows = (row for row in ROWS.values() if row.kind == kind)
        yield table.sheet(f"The {kind}", rows, (cell for cell in cells if cell.title != lacking))
    yield from step_sheet(runs.named(COST), {name: f"{row.kind}: {row.label}" for name, row in ROWS.items()})


def claims(config: SignalsConfig, runs: Runs) -> Iterator[Claim]:
    """Test whether an implicit model beats its twin, and reaches the twin's final quality in less time."""
    for kind in KINDS:
        rows = [row for row in ROWS.values() if row.kind == kind and row.implicit]
        for row in rows:
            if gaps := runs.gaps(row, row.twin, "test.PSNR"):
                better = sum(gap > 0 for gap in gaps)
                yield Claim(
                    f"{row.label} fits the {kind} better than {row.twin.label} in the same number of steps",
                    f"{fmean(gaps):+.2f} dB on average; better in {better} of {len(gaps)} runs",
                    better == len(gaps),
                )
        for row in rows:
            yield from table.sooner(
                f"{row.label} reaches the best PSNR of {row.twin.label} on the {kind} in less time than that model",
                runs.reaching(row, row.twin, "PSNR"),
                *seconds_of(runs, row, row.twin),
            )


def protocol(config: SignalsConfig, runs: Runs) -> str:
    """Describe what was run, and how the figures were selected."""
    from torchimplicit.recipes.representations.audio import sound
    from torchimplicit.recipes.representations.video import clip

    one = heard(config, ROWS["sound-fourier-implicit"], config.plan.first_seed)
    other = seen(config, ROWS["video-fourier-implicit"], config.plan.first_seed)
    a, v = sound(one), clip(other)
    frames, height, width = v.pixels.shape[:3]
    return (
        f"The sound is {a.name} ({a.seconds:.3g} s at {a.rate} Hz, {len(a.samples)} samples), fitted by models of "
        f"width {one.representation.width} in {one.optimization.steps} steps. The video is {v.name} ({frames} frames "
        f"of {width} × {height} pixels), fitted by models of width {other.representation.width} in "
        f"{other.optimization.steps} steps of {min(other.optimization.batch_size, frames * height * width)} points. "
        f"All models have one layer and are trained by Adam at {one.optimization.learning_rate:g}; there are "
        f"{config.plan.seeds} seeds. All points are fitted, and figures are over all points: nothing is held out. "
        f"Implicit models are solved by Anderson's method to a relative residual of {one.equilibria.tolerance:g} after "
        "every validation; all other steps evaluate the cell once, from the state of the step before, and its "
        "backward pass is the Neumann series after one product (T = 1). They are solved for validation and test."
    )


def notes(config: SignalsConfig, runs: Runs) -> Iterator[str]:
    """Caveats for the reader."""
    if config.plan.scale == "cpu":
        yield (
            "The signals are shorter and smaller than the paper's, the models are narrower and trained for fewer "
            "steps: compare rows with each other only."
        )
    yield (
        "Published figures for sounds are not available. Those for a video are of another video and give orientation "
        "only."
    )
    seeds, names = config.plan.seeds, {row: f"{row.label} on the {row.kind}" for row in ROWS.values()}
    counts = {row: len(runs.where(row=row)) for row in names}
    if fewer := [f"{names[row]} ({count})" for row, count in counts.items() if 0 < count < seeds]:
        yield f"These rows have fewer than {seeds} seeds: {', '.join(fewer)}."
    if options := [f"--{kind}-file" for kind in KINDS if getattr(config, f"{kind}_file")]:
        yield f"The command below was run with {' and '.join(options)} as well; the files are named above."
    gaps = {row: runs.gaps(row, row.twin, "test.PSNR") for row in names if row.implicit}
    behind = [names[row] for row, values in gaps.items() if values and fmean(values) < 0]
    if behind and config.plan.scale == "cpu":
        yield (
            f"These models are behind their explicit counterparts after the same number of steps: {', '.join(behind)}. "
            "The paper's number of steps and width were not tested."
        )
    yield from table.still_rising(runs)
    yield from table.diverged(runs)


def drawings(config: SignalsConfig, runs: Runs, folders: Mapping[str, Run]) -> Iterator[CaptionedFigure]:
    """PSNR during training, and the reconstructions of one filter's models with the first seed."""
    from torchimplicit.recipes.representations.audio import RUNNER as SOUNDS
    from torchimplicit.recipes.representations.audio import sound, spectrograms
    from torchimplicit.recipes.representations.image import quantized
    from torchimplicit.recipes.representations.video import RUNNER as VIDEOS
    from torchimplicit.recipes.representations.video import clip, strip

    if not any(line.key for line in runs):
        return
    figure, panels = axes(2, width=5.2, height=3.6)
    for panel, kind in zip(panels, KINDS, strict=True):
        rows = [row for row in ROWS.values() if row.kind == kind]
        looks = [{**style(FILTERS.index(r.filter)), "linestyle": "-" if r.implicit else "--"} for r in rows]
        series = [(r.label, runs.where(row=r), look) for r, look in zip(rows, looks, strict=True)]
        table.curves(panel, series, "PSNR")
        panel.set(ylabel="PSNR, dB", title=f"the {kind}")
    yield CaptionedFigure(
        "training",
        figure,
        "PSNR during training, mean over the seeds, of implicit models (solid) and explicit models (dashed).",
    )
    caption = f"of its fits by {NAMES[SHOWN, True]} and {NAMES[SHOWN, False]} with the first seed, with their PSNR."
    seed = config.plan.first_seed
    for kind in KINDS:
        shown = Row(kind=kind, filter=SHOWN, implicit=True)
        pair = [line for row in (shown, shown.twin) for line in runs.where(row=row, seed=seed) if line["test"]]
        if len(pair) < 2:
            continue
        titles = [f"{line['row'].label}\n{line['test.PSNR']:.1f} dB" for line in pair]
        if kind == "sound":
            samples, rate = (waveform := sound(heard(config, shown, seed))).samples, waveform.rate
            fits = [SOUNDS.task(heard(config, line["row"], seed), folders[line.name]) for line in pair]
            lines = {"the sound": samples}
            lines |= {title: fit.on_grid([len(samples)]) for title, fit in zip(titles, fits, strict=True)}
            yield CaptionedFigure("sound", spectrograms(lines, rate), f"Spectrograms of the sound and {caption}")
        else:
            pixels = clip(seen(config, shown, seed)).pixels
            fits = [VIDEOS.task(seen(config, line["row"], seed), folders[line.name]) for line in pair]
            frames: dict[str, Sequence[Tensor]] = {"video": list(pixels)}
            frames |= {t: list(fit.on_grid(pixels.shape[:3], quantized)) for t, fit in zip(titles, fits, strict=True)}
            yield CaptionedFigure("video", strip(frames), f"Frames of the video and {caption}")


TABLE = table.published(
    globals(),
    title="A sound and a video: implicit and explicit representations",
    source="Huang, Bai and Kolter 2021, (Implicit)²: Implicit Layers for Implicit Representations (NeurIPS 2021): "
    "fits of audio and of video",
    figures=table.by_name(cost=table.read("costs.json")),
)
