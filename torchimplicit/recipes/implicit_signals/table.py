"""The table: what its runs come to."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from torchimplicit.recipes.fields.audio.config import SoundConfig
from torchimplicit.recipes.fields.audio.task import sound
from torchimplicit.recipes.fields.cost import COLUMNS, cells
from torchimplicit.recipes.fields.video.config import VideoConfig
from torchimplicit.recipes.fields.video.task import clip
from torchimplicit.recipes.implicit_signals.claims import claims
from torchimplicit.recipes.implicit_signals.config import SignalsConfig
from torchimplicit.recipes.implicit_signals.drawing import drawings
from torchimplicit.recipes.implicit_signals.read import Measured, measured
from torchimplicit.recipes.implicit_signals.rows import COST, KINDS, ROWS, Kind, Row, jobs, training
from torchimplicit.recipes.plain import to_plain
from torchimplicit.recipes.reproduce.record import Sheet, spread
from torchimplicit.recipes.reproduce.runner import Reproduction, Summary
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.tables import Column, Table
from torchimplicit.recipes.training.results import Results, still_rising


def summarize(config: SignalsConfig, runs: dict[str, Run]) -> Summary:
    """See :class:`~torchimplicit.recipes.reproduce.runner.Summary`."""
    found = measured(config, runs)
    sheets = [Sheet(f"The {kind}", _quality(found, kind)) for kind in KINDS]
    if found.cost:
        rows = [
            [f"{kind}: {_row(name).label}", *cells(found.cost[name])]
            for kind in KINDS
            for name in found.cost
            if _row(name).kind == kind
        ]
        sheets.append(Sheet("A training step", Table([Column("Model"), *COLUMNS], rows)))
    return Summary(
        title="A sound and a video: implicit and explicit representations",
        source="Huang, Bai and Kolter 2021, (Implicit)²: Implicit Layers for Implicit Representations (NeurIPS 2021): "
        "fits of audio and of video",
        protocol=_protocol(config),
        sheets=sheets,
        claims=claims(found),
        drawings=drawings(config, found, runs),
        notes=_notes(config, found),
        runs={
            **{f"{name}-seed{seed}": _figures(one) for (name, seed), one in found.runs.items()},
            **({COST: to_plain(found.cost)} if found.cost else {}),
        },
    )


def _row(name: str) -> Row:
    return ROWS[name]


def _quality(found: Measured, kind: Kind) -> Table:
    columns = [
        Column("Model"),
        Column("Parameters"),
        Column("PSNR", "dB", "Of all points, at the weights of the best validation: mean ± deviation over the seeds."),
        *([Column("SNR", "dB", "Of the error beside the sound's own power.")] if kind == "sound" else []),
        *([Column("Published", "dB", "At width 1024, on another video at another size.")] if kind == "video" else []),
        Column("Over its twin", "dB", "The PSNR less that of the explicit twin, mean over the seeds."),
        Column(
            "Evaluations", "", "Of the cell in a training step, mean: one, and the solves that follow the validations."
        ),
        Column("Training", "s", "Wall seconds until the best validation, mean; the machine was shared."),
    ]
    rows = []
    for row in ROWS.values():
        if row.kind != kind:
            continue
        several = found.of(row)
        over = found.over_twin(row) if row.implicit else []
        seconds = [one.best.seconds for one in several if one.best is not None]
        evaluations = [one.costs.forward for one in several if one.costs is not None]
        rows.append(
            [
                row.label,
                str(several[0].parameters) if several else "–",
                spread(found.figures(row, "PSNR"), 2),
                *([spread(found.figures(row, "SNR"), 2)] if kind == "sound" else []),
                *([f"{row.published:.2f}"] if row.published is not None else []),
                f"{fmean(over):+.2f}" if over else "–",
                (f"{fmean(evaluations):.2f}" if row.implicit else "1") if evaluations else "–",
                f"{fmean(seconds):.1f}" if seconds else "–",
            ]
        )
    return Table(columns, rows)


def _protocol(config: SignalsConfig) -> str:
    heard = training(config, ROWS["sound-fourier-implicit"], config.plan.first_seed)
    seen = training(config, ROWS["video-fourier-implicit"], config.plan.first_seed)
    assert isinstance(heard, SoundConfig)
    assert isinstance(seen, VideoConfig)
    a, v = sound(heard), clip(seen)
    frames, height, width = v.pixels.shape[:3]
    return (
        f"The sound: {a.name}, {a.seconds:.3g} s at {a.rate} Hz, {len(a.samples)} samples, by models of width "
        f"{heard.representation.width} in {heard.optimization.steps} steps. The video: {v.name}, {frames} frames of "
        f"{width} × {height} pixels, by models of width {seen.representation.width} in {seen.optimization.steps} steps "
        f"of {min(seen.optimization.batch_size, frames * height * width)} points. One layer; Adam at "
        f"{heard.optimization.learning_rate:g}; {config.plan.seeds} seeds. All points are fitted, and the figures are "
        "over all of them: nothing is held out. Implicit models: a solve by Anderson's method to a relative residual "
        f"of {heard.equilibria.tolerance:g} after every validation, and then one evaluation a step from the last "
        "state, with the Neumann series after its first product (T = 1); for validation and test they are solved."
    )


def _notes(config: SignalsConfig, found: Measured) -> list[str]:
    notes = [
        "The signal-to-noise ratios of the paper's sounds are not known here; those of its video stand beside ours for "
        "orientation alone."
    ]
    if config.plan.scale == "cpu":
        notes.insert(
            0,
            "Shorter and smaller signals, narrower models and fewer steps than the paper's: rows compare among "
            "themselves.",
        )
    fewer = [
        f"{row.label} on the {row.kind} ({len(found.of(row))})"
        for row in ROWS.values()
        if 0 < len(found.of(row)) < len(found.seeds)
    ]
    if fewer:
        notes.append(f"Of {len(found.seeds)} seeds, fewer were run of: {', '.join(fewer)}.")
    own = [f"--{kind}-file" for kind, file in (("sound", config.sound_file), ("video", config.video_file)) if file]
    if own:
        notes.append(f"The command below was also given {' and '.join(own)}; the files are named above.")
    behind = [
        f"{row.label} on the {row.kind}"
        for row in ROWS.values()
        if row.implicit and fmean(found.over_twin(row) or [0]) < 0
    ]
    if behind and config.plan.scale == "cpu":
        notes.append(
            f"Behind their explicit twins in as many steps: {', '.join(behind)}. Whether they would catch up in the "
            "paper's number of steps, or at its width, was not measured here."
        )
    notes += still_rising(found.runs.values())
    diverged = [f"{name}, seed {seed}" for (name, seed), one in found.runs.items() if one.state == "diverged"]
    if diverged:
        notes.append(f"Diverged: {', '.join(diverged)}.")
    return notes


def _figures(one: Results) -> dict[str, Any]:
    return {
        "state": one.state,
        "test": None if one.test is None else one.test.figures,
        "best": None if one.best is None else {"step": one.best.step, **one.best.figures},
        "parameters": one.parameters,
        "costs": to_plain(one.costs),
        "seconds": one.seconds,
        "validations": [{"step": v.step, "seconds": v.seconds, **v.figures} for v in one.validations],
    }


TABLE = Reproduction(jobs, summarize)
