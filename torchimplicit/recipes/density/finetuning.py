"""Table: density functionals that are pre-trained, then fine-tuned on the densities at their minima."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torchimplicit.recipes.density.learning_settings import Finetuning, Kind, Pretraining, Schooling, Stepping
from torchimplicit.recipes.density.results import PRECISION, cell, draw_seeds, labelled, missing, shown, summary, told
from torchimplicit.recipes.density.settings import Molecules
from torchimplicit.recipes.runtime import table
from torchimplicit.recipes.runtime.settings import different, known_rows, positive
from torchimplicit.recipes.runtime.table import CaptionedFigure, Cell, Claim, Job, Line, Plan, Runs, TitledTable

if TYPE_CHECKING:
    from torchimplicit.recipes.runtime.run import Run

HELD_OUT_L, HELD_OUT_L1, BETTER, LOWERED, APART = 1e-4, 0.035, 0.98, 0.3, 0.05
"""The targets: L and L1 of held-out molecules; the share of them that beat the superposition of atoms; how much
fine-tuning lowers L compared with pre-training alone for the same time; how far the estimators' results may differ."""

SLOWED = 2.0
"""Minimizations count as degraded if at some time they take this many times their initial number of steps."""


@dataclass(frozen=True)
class Way:
    """A fine-tuning variant.

    Attributes:
        label: label to display.
        changes: changes of the settings.
        one: on the largest of the molecules alone.
    """

    label: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    one: bool = False


DESCENT: dict[str, Any] = {"inner": "descent", "inner_tolerance": 1e-4}
"""Settings of the slides' minimization by gradient descent."""

CORRECTED: dict[str, Any] = {**DESCENT, "cold": True, "correction": 4}
"""With iterates on the way in the loss: from the superposition of atoms, for from the density found last there are
few."""

WAYS: dict[str, Way] = {
    "implicit": Way("implicit"),
    "eqprop": Way("propagation, symmetric", {"gradient": "eqprop"}),
    "damped": Way("implicit, damped", {"gradient": "damped"}),
    "energy": Way("implicit, with energies", {"energy_weight": 1.0}),
    "descent": Way("implicit; momentum descent", DESCENT),
    "descent-one": Way("implicit; momentum descent, one molecule", DESCENT, one=True),
    "descent-damped": Way("implicit, damped; momentum descent", {**DESCENT, "gradient": "damped"}),
    "descent-floor": Way("implicit; momentum descent, floor on λmin", {**DESCENT, "floor_weight": 1e-2}),
    "descent-correction": Way("implicit; momentum descent, fixed-point correction, uniform", CORRECTED),
    "descent-random": Way(
        "implicit; momentum descent, fixed-point correction, random", {**CORRECTED, "correction_random": True}
    ),
}
"""The fine-tuning variants, by the names of their runs."""

REMEDIES = {
    "implicit": "preconditioned L-BFGS instead",
    "descent-damped": "a damped gradient",
    "descent-floor": "a floor on λmin",
    "descent-correction": "fixed-point correction at uniform iterates",
    "descent-random": "fixed-point correction at random iterates",
}
"""Remedies that may keep the minimizations of ``descent`` from growing, by the variants that try it."""

KINDS: dict[Kind, str] = {
    "potential": "external potential",
    "functional": "functional of the density",
    "density": "density at once",
}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Does the implicit loss improve a pre-trained functional, with which gradient, and is it stable?"""

    plan: Plan = field(default_factory=lambda: Plan(seeds=2))

    molecules: Molecules = field(
        default_factory=lambda: Molecules(train_copies=12, validation_copies=2, test_copies=4, distort=0.08)
    )

    kinds: tuple[Kind, ...] = ("potential", "functional", "density")
    """Kinds of network to compare: a learned external potential, a functional of the density, or a direct prediction of
    the density."""

    rows: tuple[str, ...] = ("implicit", "eqprop", "damped", "descent", "descent-one")
    """Fine-tuning variants to run from the pre-trained weights, by the names of their runs. A directly predicted
    density has none."""

    labels: int = 16
    """Number of labelled densities per molecule used to pre-train a functional."""

    pretraining_steps: int = 3000
    """Optimizer steps of pre-training, four molecules each."""

    finetuning_steps: int = 100
    """Optimizer steps of fine-tuning, four molecules each."""

    finetuning_rate: float = 3e-4
    """Peak learning rate of fine-tuning."""

    descent_steps: int = 1500
    """Largest number of gradient-descent steps in one minimization."""

    check_grid: int = 3
    """Level of PySCF's grid on which all densities are minimized again at the end, as a check."""

    def __post_init__(self) -> None:
        positive(self, "labels", "pretraining_steps", "finetuning_steps", "finetuning_rate", "descent_steps")
        known_rows(self.rows, list(WAYS))
        different(self, "kinds")


def schooled(config: FinetuneConfig, kind: Kind, seed: int) -> Schooling:
    """The settings of one run."""
    pretraining = Pretraining(
        molecules=config.molecules,
        kind=kind,
        labels=config.labels,
        stepping=Stepping(steps=config.pretraining_steps, measure_every=max(1, config.pretraining_steps // 15)),
        check_grid=config.check_grid,
        page=False,
        seed=seed,
    )
    if kind == "density":
        return Schooling(pretraining=pretraining, longer=False)
    stepping = Stepping(
        steps=config.finetuning_steps,
        learning_rate=config.finetuning_rate,
        measure_every=max(1, config.finetuning_steps // 5),
        clip=1.0,
        decay=0.0,
    )
    plain = Finetuning(stepping=stepping, check_grid=config.check_grid, page=False, seed=seed)
    ways = {}
    for name in config.rows:
        way = WAYS[name]
        more: dict[str, Any] = {"inner_steps": config.descent_steps} if way.changes.get("inner") == "descent" else {}
        only = config.molecules.sources[-1:] if way.one else ()
        ways[name] = replace(plain, only=only, **way.changes, **more)
    return Schooling(pretraining=pretraining, ways=ways)


def jobs(config: FinetuneConfig) -> list[Job]:
    """All jobs, seed by seed."""
    return [
        Job(f"{kind}-{seed}", "ofdft-schooling", schooled(config, kind, seed), {"row": kind, "seed": seed})
        for seed in config.plan.all_seeds
        for kind in config.kinds
    ]


# -- what the runs come to ---------------------------------------------------------------------------------------------


def figures(config: FinetuneConfig, run: Run) -> dict[str, Any] | None:
    """Figures of each nested run that finished."""
    from torchimplicit.recipes.density.schooling import LONGER, PRETRAINED, within

    values: dict[str, Any] = {}
    for name in (PRETRAINED, LONGER, *config.rows):
        one = within(run, name)
        if not (one.path / "results.json").is_file():
            continue
        held = one.read_json("results.json")
        if held["state"] == "complete":
            figures_of_run = of_pretraining(held) if name in (PRETRAINED, LONGER) else of_finetuning(held)
            values[name.replace("-", "_")] = figures_of_run
    return values or None


def of_pretraining(held: Mapping[str, Any]) -> dict[str, Any]:
    """The record's part of a pre-training."""
    return {
        "weights": held["weights"],
        "steps": held["course"]["step"],
        "seconds": held["course"]["seconds"],
        "spurious": held["spurious"],
        "spurious_start": held["spurious_start"],
        "count": len(held["test"]),
        "test": summary(held["test"]),
        **({"start": summary(held["start_test"])} if held["start_test"] else {}),
        "glances": [{**glance["figures"], "step": glance["step"]} for glance in held["course"]["glances"]],
    }


def of_finetuning(held: Mapping[str, Any]) -> dict[str, Any]:
    """The record's part of a fine-tuning."""
    pairs = list(zip(held["before"], held["test"], strict=True))
    return {
        "seconds": held["course"]["seconds"],
        "wall": held["wall"],
        "selected": held["selected"],
        "trained_on": len(held["trained_on"]),
        "before": summary(held["before"]),
        "test": summary(held["test"]),
        "before_train": summary(held["before_train"]),
        "train": summary(held["train"]),
        "reference_before": fmean(map(abs, held["reference_before"])),
        "reference": fmean(map(abs, held["reference"])),
        "better_than_before": fmean(new["loss"] < old["loss"] for old, new in pairs),
        "saddles_before": fmean(one["least"] < 0 for one in held["before"]),
        "saddles": fmean(one["least"] < 0 for one in held["test"]),
        "spurious_before": held["spurious_before"],
        "spurious": held["spurious"],
        "effort": held["effort"],
        "glances": [{**glance["figures"], "step": glance["step"]} for glance in held["course"]["glances"]],
    }


Row = tuple[Kind, str]
"""A kind of network and its fine-tuning variant; without a variant, the pre-trained weights."""


def sheets(config: FinetuneConfig, runs: Runs) -> Iterator[TitledTable]:
    """Tables of pre-training, of fine-tuning, and of how hard the densities are to find."""
    kinds = [kind for kind in config.kinds if runs.of(kind, "pretrained.test.loss")]
    if kinds:
        yield _pretraining(kinds, runs)
    rows: list[Row] = [
        (kind, way)
        for kind in config.kinds
        for way in ("", "pretrained-longer", *config.rows)
        if kind != "density" and _lines(runs, kind, way)
    ]
    if rows:
        yield _finetuning(rows, runs)
        yield _efforts([row for row in rows if row[1] in WAYS], runs)


def _pretraining(kinds: list[Kind], runs: Runs) -> TitledTable:
    of = partial(cell, runs)
    cells = [
        Cell[Kind]("Network gives", lambda kind: KINDS[kind]),
        Cell("L", of("pretrained.test.loss", 3, 1e3), "10⁻³",
             "of the test molecules, each from the superposition of atoms"),
        Cell("L1 per electron", of("pretrained.test.l1")),
        Cell("L, finer grid", of("pretrained.test.finer_loss", 3, 1e3), "10⁻³"),
        Cell("ΔE", of("pretrained.test.energy_error", 3, 1e3), "mHa", "at the minimum"),
        Cell("Better than MINAO", of("pretrained.test.better", 3, 100), "%", "in L and L1, on the finer grid too"),
        Cell("Spurious minima", of("pretrained.spurious", 3, 100), "%",
             "converged, and more than 50 mHa per electron or twice MINAO's L away"),
        Cell("Unconverged", of("pretrained.test.unconverged", 3, 100), "%"),
        Cell("Inner steps", of("pretrained.test.mean_steps", 2)),
        Cell("Weights", of("pretrained.weights", 6)),
        Cell("Time", of("pretrained.seconds", 2), "s", "of the processor, in the optimizer"),
    ]  # fmt: skip
    below = []
    for kind in [kind for kind in kinds if runs.of(kind, "pretrained.start.loss")][:1]:
        scales = {"loss": 1e3, "l1": 1.0, "finer_loss": 1e3, "energy_error": 1e3, "better": 100.0}
        starts = [of(f"pretrained.start.{name}", 3, scale)(kind) for name, scale in scales.items()]
        below.append(["nothing: linear terms alone", *starts])
    guess = [of("pretrained.test.guess_loss", 3, 1e3)(kinds[0]), of("pretrained.test.guess_l1")(kinds[0])]
    below.append(["superposition of atoms (MINAO)", *guess])
    return table.sheet("Pre-training: test molecules", kinds, cells, below)


def _lines(runs: Runs, kind: Kind, way: str) -> list[Line]:
    """The runs with this variant; without one, the first run, which holds the figures before fine-tuning."""
    names = [way] if way else [*WAYS]
    return [line for line in runs.where(row=kind) if any(line[_key(name)] is not None for name in names)]


def _key(way: str) -> str:
    return way.replace("-", "_")


BEFORE = {"test": "before", "train": "before_train", "reference": "reference_before"}
BEFORE |= {name: f"{name}_before" for name in ("spurious", "saddles")}
"""Figures before fine-tuning, which every variant has, by their names afterwards."""


def _figure(runs: Runs, row: Row, path: str) -> list[Any]:
    """A figure of every seed; before fine-tuning if the variant is empty."""
    kind, way = row
    if way:
        return runs.of(kind, f"{_key(way)}.{path}")
    head, _, tail = path.partition(".")
    if head not in BEFORE:
        return []
    paths = [".".join((_key(name), BEFORE[head], *filter(None, [tail]))) for name in WAYS]
    figures = ([line[one] for one in paths if line[one] is not None] for line in runs.where(row=kind))
    return [found[0] for found in figures if found]


def _finetuning(rows: list[Row], runs: Runs) -> TitledTable:
    def of(path: str, digits: int = 3, scale: float = 1.0) -> Any:
        return lambda row: told(_figure(runs, row, path), digits, scale)

    def label(row: Row) -> str:
        kind, way = row
        ways = {"": "pre-trained", "pretrained-longer": "pre-trained for as long"}
        return f"{KINDS[kind]}: {ways[way] if way in ways else WAYS[way].label}"

    cells = [
        Cell[Row]("Network; gradient", label),
        Cell("L", of("test.loss", 3, 1e3), "10⁻³", "of the test molecules, each from the superposition of atoms"),
        Cell("L1 per electron", of("test.l1")),
        Cell("L, finer grid", of("test.finer_loss", 3, 1e3), "10⁻³"),
        Cell("ΔE, constants refitted", of("test.energy_error", 3, 1e3), "mHa",
             "at the minimum; by those of fine-tuning that its molecules' minima give, in the other rows as trained"),
        Cell("ΔE, as trained", of("test.trained_energy_error", 3, 1e3), "mHa"),
        Cell("ΔE at the reference", of("reference", 3, 1e3), "mHa"),
        Cell("Better than MINAO", of("test.better", 3, 100), "%", "in L and L1, on the finer grid too"),
        Cell("Better than before", of("better_than_before", 3, 100), "%", "in L"),
        Cell("Spurious", of("spurious", 3, 100), "%"),
        Cell("L, training molecules", of("train.loss", 3, 1e3), "10⁻³"),
        Cell("Saddles", of("saddles", 3, 100), "%", "converged where the Hessian has a negative eigenvalue"),
        Cell("λmin", of("test.least"), "Ha", "the least eigenvalue of the Hessian at a minimum"),
        Cell("Inner steps", of("test.mean_steps", 2)),
        Cell("Time", of("seconds", 2), "s", "of the processor, in the optimizer"),
    ]  # fmt: skip
    return table.sheet("Fine-tuning: test molecules", rows, cells)


def _efforts(rows: list[Row], runs: Runs) -> TitledTable:
    def of(place: int, name: str, scale: float = 1.0) -> Any:
        def cell(row: Row) -> str:
            efforts = _figure(runs, row, "effort")
            return told([one[place][name] for one in efforts if len(one) > 1], 3, scale)

        return cell

    def counted(figure: Callable[[list[float]], float]) -> Callable[[Row], str]:
        return lambda row: told(map(figure, _steps(runs, row)), 3)

    cells = [
        Cell[Row]("Network; gradient; densities", lambda row: f"{KINDS[row[0]]}: {WAYS[row[1]].label}"),
        Cell("Inner steps at first", of(0, "steps"), "",
             "the mean of a molecule in the first tenth of the steps, where each molecule's first minimization begins "
             "at the superposition of atoms"),
        Cell("at the end", of(-1, "steps"), "", "in the last tenth, from the density found last"),
        Cell("From the superposition, before", counted(lambda steps: steps[0]), "", "of the validation molecules"),
        Cell("the most during", counted(lambda steps: max(steps[1:]))),
        Cell("Unconverged at first", of(0, "unconverged", 100), "%"),
        Cell("at the end ", of(-1, "unconverged", 100), "%"),
        Cell("Adjoint", of(-1, "adjoint"), "", "products, or gradients of nudged energies, of a molecule"),
        Cell("Molecules", lambda row: told(_figure(runs, row, "trained_on"), 3)),
        Cell("Wall time", lambda row: told(_figure(runs, row, "wall"), 2), "s"),
    ]  # fmt: skip
    return table.sheet("Fine-tuning: how hard the densities are to find", rows, cells)


def claims(config: FinetuneConfig, runs: Runs) -> Iterator[Claim]:
    """Test whether the targets are met, kind by kind."""
    for kind in config.kinds:
        losses = runs.of(kind, "pretrained.test.loss")
        if losses:
            yield from _quality(kind, runs)
        if kind != "density":
            yield from _helps(kind, config, runs)
    yield from _stable(config, runs)


def _quality(kind: Kind, runs: Runs) -> Iterator[Claim]:
    loss, l1 = (fmean(runs.of(kind, f"pretrained.test.{name}")) for name in ("loss", "l1"))
    better = fmean(runs.of(kind, "pretrained.test.better"))
    yield Claim(
        f"{KINDS[kind]}: on held-out molecules L is at most {1e3 * HELD_OUT_L:g}e-3, L1 per electron {HELD_OUT_L1:g}, "
        f"and {100 * BETTER:g} % are better than the superposition of atoms",
        f"L {1e3 * loss:.3g}e-3, L1 {l1:.3g}, {100 * better:.3g} % better",
        loss <= HELD_OUT_L and l1 <= HELD_OUT_L1 and better >= BETTER,
    )
    if kind != "density":
        spurious = fmean(runs.of(kind, "pretrained.spurious"))
        yield Claim(
            f"{KINDS[kind]}: at most 1 % of the held-out molecules have a spurious minimum",
            f"{100 * spurious:.3g} %",
            spurious <= 0.01,
        )


def _helps(kind: Kind, config: FinetuneConfig, runs: Runs) -> Iterator[Claim]:
    paths = ("implicit.test.loss", "pretrained.test.loss", "pretrained_longer.test.loss")
    pairs = [[line[path] for path in paths] for line in runs.where(row=kind)]
    pairs = [one for one in pairs if None not in one]
    if pairs:
        tuned, before, longer = (fmean(one[place] for one in pairs) for place in range(3))
        lowered = 1 - tuned / min(before, longer)
        yield Claim(
            f"{KINDS[kind]}: fine-tuning by the implicit loss lowers the test L by at least {100 * LOWERED:g} % "
            "against pre-training alone, be it as long as before or for the time of both together",
            f"{1e3 * tuned:.3g}e-3, {1e3 * before:.3g}e-3 before, {1e3 * longer:.3g}e-3 by pre-training for as long",
            lowered >= LOWERED,
        )
    for way in ("eqprop", "damped"):
        both = [line for line in runs.where(row=kind) if line["implicit"] is not None and line[way] is not None]
        moved = [line for line in both if line["implicit.selected"] > 0]
        if not both:
            continue
        apart = max(
            (abs(line[f"{way}.test.loss"] / line["implicit.test.loss"] - 1) for line in moved), default=math.nan
        )
        still = f"; with {len(both) - len(moved)} of {len(both)} seeds the pre-trained weights were selected"
        yield Claim(
            f"{KINDS[kind]}: {WAYS[way].label} ends within {100 * APART:g} % of the test L of exact implicit "
            "differentiation, seed by seed",
            f"farthest apart {100 * apart:.2g} %" + (still if len(moved) < len(both) else ""),
            apart <= APART if moved else None,
        )


def _stable(config: FinetuneConfig, runs: Runs) -> Iterator[Claim]:
    """The slides' observation: with many molecules, fixed-point search becomes slower and slower."""
    for kind in config.kinds:
        grown = {way: growth for way in config.rows if (growth := _growth(runs, (kind, way))) is not None}
        if "descent" not in grown:
            continue
        many, start = grown["descent"], f"{KINDS[kind]}, densities by momentum descent: "
        if "descent-one" in grown:
            one = grown["descent-one"]
            yield Claim(
                f"{start}minimizations grow at least {SLOWED:g} times longer in fine-tuning with several molecules and "
                "not with one, as the slides report",
                f"{many:.2g} times with several, {one:.2g} times with one",
                many >= SLOWED > one,
            )
        for way, remedy in REMEDIES.items():
            if way in grown:
                yield Claim(
                    f"{start}with {remedy}, minimizations with several molecules grow less than {SLOWED:g} times",
                    f"{grown[way]:.2g} times, {many:.2g} without",
                    grown[way] < SLOWED if many >= SLOWED else None,
                )


def _growth(runs: Runs, row: Row) -> float | None:
    """The most steps that were counted during fine-tuning over those before it, see :func:`_steps`; the largest of the
    seeds, ``None`` without any."""
    return max((max(steps[1:]) / steps[0] for steps in _steps(runs, row)), default=None)


def _steps(runs: Runs, row: Row) -> list[list[float]]:
    """Steps of the validation molecules' minimizations from the superposition of atoms, their mean at each glance;
    for every seed that has them."""
    counts = [[glance["steps"] for glance in glances if "steps" in glance] for glances in _figure(runs, row, "glances")]
    return [steps for steps in counts if len(steps) > 1]


def protocol(config: FinetuneConfig, runs: Runs) -> str:
    """Describe what was run, and how the figures were selected."""
    one = config.molecules
    if one.held_out:
        which = f"{one.limit} molecules of {', '.join(one.sources)}, {one.held_out} to select by and as many to test"
    else:
        which = (
            f"{', '.join(one.sources)} with {one.train_copies} distorted copies each (σ = {one.distort:g} Å) to train "
            f"on, {one.validation_copies} to select by and {one.test_copies} to test"
        )
    return (
        f"{which}; {labelled(one.chemistry.grid)}. Beside Thomas-Fermi, .4 von Weizsäcker, LDA and linear terms that "
        "are fitted in closed form stands a message-passing network of the density's coefficients. Pre-training: "
        f"{config.pretraining_steps} steps of AdamW, four molecules each, on the energies and on the slopes in the "
        "metric of the Hessian, that is the implicit loss linearized; a potential and a density at once on the ground "
        f"states, a functional on {config.labels} densities a molecule with random displacements and on-policy points. "
        f"Fine-tuning: the network's weights by the L of the minimum, {config.finetuning_steps} steps at "
        f"{config.finetuning_rate:g}. Inner solver: preconditioned L-BFGS to 1e-6; momentum descent (3e-3, .9) to "
        f"1e-4, as the slides have it. {PRECISION}"
    )


def notes(config: FinetuneConfig, runs: Runs) -> Iterator[str]:
    """Caveats for the reader."""
    if "potential" in config.kinds:
        yield (
            "The external potential is linear in the density: the functional is as convex as Thomas, Fermi and von "
            "Weizsäcker's, and has one minimum. It has learned a potential for each geometry, not a functional."
        )
    if "density" in config.kinds:
        yield "A density at once has no energy."
    if counts := runs.of(config.kinds[0], "pretrained.count"):
        yield f"{shown(counts[0], 2)} test molecules."
    for line in runs:
        wanted = [] if line["row"] == "density" else [*config.rows, "pretrained-longer"]
        if lacking := [way for way in wanted if line[_key(way)] is None]:
            yield f"{KINDS[line['row']]}, seed {line['seed']}: {', '.join(lacking)} not done."
    yield from missing(len(jobs(config)), runs)


def drawings(config: FinetuneConfig, runs: Runs, folders: Mapping[str, Run]) -> Iterator[CaptionedFigure]:
    """The validation molecules during fine-tuning."""
    from torchimplicit.recipes.runtime.page import COLOURS, axes, legend_beside

    kinds = [kind for kind in config.kinds if kind != "density" and _lines(runs, kind, "")]
    if not kinds:
        return
    figure, panels = axes(len(kinds), width=4.6, height=3.6)
    for panel, kind in zip(panels, kinds, strict=True):
        for index, way in enumerate(config.rows):
            done, colour = Runs(_lines(runs, kind, way)), COLOURS[index % len(COLOURS)]
            draw_seeds(panel, done, f"{_key(way)}.glances", "step", "L", WAYS[way].label, color=colour)
        panel.set(title=KINDS[kind], xlabel="step", ylabel="10³ L, validation molecules")
    legend_beside(panels[-1])
    yield CaptionedFigure(
        "validation", figure, "The validation molecules along fine-tuning, by the way; a line a seed."
    )


TABLE = table.published(
    globals(),
    "Density functionals pre-trained, then fine-tuned by their minima",
    "Slides on fine-tuning density functionals under an electron-number constraint (Adamowicz): pre-trained on "
    "labels, fine-tuned on one molecule by equilibrium propagation; with several molecules the fixed-point search took "
    "longer and longer; no figures. Those here are ours.",
)
