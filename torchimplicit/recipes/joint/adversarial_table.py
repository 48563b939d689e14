"""Adversarial training of an equilibrium model: attacks by joint inference beside projected gradient ascent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from torchimplicit.recipes.joint.adversarial import CLEAN, AttacksConfig, adversarial_digits, adversarial_mnist
from torchimplicit.recipes.runtime import table
from torchimplicit.recipes.runtime.page import axes, canvas, style
from torchimplicit.recipes.runtime.settings import Machine, positive
from torchimplicit.recipes.runtime.table import Cell, Claim, Drawing, Job, Plan, Runs, Sheet

if TYPE_CHECKING:
    from torchimplicit.recipes.runtime.run import Run

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "clean": ("clean images", {"adversary": "none"}),
    "pgd": ("PGD-10", {"adversary": "pgd", "attack_steps": 10, "attack_step_size": 0.3}),
    "jiio": ("JIIO-20", {"adversary": "jiio"}),
    "envelope": ("JIIO-20, envelope", {"adversary": "jiio", "attack_gradient": "envelope"}),
}
"""What is trained on: a label, and the settings."""

PUBLISHED = {"pgd": (99.18, 96.53, 95.74), "jiio": (99.32, 95.74, 96.63)}
"""Gurumurthy et al. 2021, Table 5, MNIST: clean, attacked by PGD, attacked by JIIO, in percent."""


@dataclass(frozen=True, kw_only=True)
class AdversarialTableConfig:
    """Clean, PGD and JIIO training; clean images and images attacked by PGD and by JIIO; strength against time."""

    plan: Plan = field(default_factory=Plan)

    data: Literal["digits", "mnist"] = "digits"
    """Which images."""

    data_dir: Path | None = None
    """The folder that holds them."""

    steps: int | None = None
    """Of each training; by default the recipe's."""

    machine: Machine = field(default_factory=lambda: Machine(tensorboard=False))

    def __post_init__(self) -> None:
        positive(self, "steps")


def attacked(config: AdversarialTableConfig, row: str, seed: int) -> AttacksConfig:
    """One run's settings."""
    base = adversarial_digits() if config.data == "digits" else adversarial_mnist()
    optimization = replace(base.optimization, seed=seed)
    if config.steps is not None:
        optimization = replace(
            optimization, steps=config.steps, validate_every=min(config.steps, optimization.validate_every)
        )
    if config.plan.scale == "paper":
        base = replace(base, train_images=None, test_images=None)
        optimization = replace(optimization, steps=20 * optimization.steps)
    training = replace(
        base, **ROWS[row][1], data_dir=config.data_dir, optimization=optimization, machine=config.machine
    )
    return AttacksConfig(training=training)


def jobs(config: AdversarialTableConfig) -> list[Job]:
    """Every way of training, of one seed after the other."""
    return [
        Job(
            f"{row}-seed{seed}",
            "jiio-adversarial-attacks",
            attacked(config, row, seed),
            {"row": row, "seed": seed},
        )
        for seed in config.plan.all_seeds
        for row in ROWS
    ]


def figures(config: AdversarialTableConfig, run: Run) -> dict[str, Any] | None:
    """Of a run whose attacks are measured."""
    attacks = table.read("attacks.json")(config, run)
    trained = table.read("results.json")(config, run)
    if attacks is None or trained is None:
        return None
    return {"attacks": attacks, **{name: trained[name] for name in ("validations", "seconds", "costs")}}


# -- what the runs come to ---------------------------------------------------------------------------------------------


def of(runs: Runs, row: str, attack: str, what: str) -> list[float]:
    """A figure of an attack on the models of a row, seed by seed."""
    return runs.of(row, f"attacks.{attack}.{what}")


def ratio(runs: Runs, row: str, one: str, other: str, what: str) -> float:
    """Mean over the seeds of a figure of one attack over that of another."""
    return fmean(a / b for a, b in zip(of(runs, row, one, what), of(runs, row, other, what), strict=True))


def strongest(config: AdversarialTableConfig, kind: str) -> str:
    """The name of the longest attack of a kind: those of the table of accuracies."""
    return attacked(config, "jiio", 0).strongest(kind)


def sheets(config: AdversarialTableConfig, runs: Runs) -> list[Sheet]:
    """Accuracies, and the strength of the attacks."""
    spread = table.spread
    shown = ((CLEAN, "Clean"), *((name, f"Under {name}") for name in (strongest(config, k) for k in ("PGD", "JIIO"))))
    cells = [Cell[str]("Trained on", lambda row: ROWS[row][0])]
    for place, (attack, title) in enumerate(shown):

        def accuracy(row: str, attack: str = attack) -> str:
            return spread(of(runs, row, attack, "accuracy"), 1, 100)

        def published(row: str, place: int = place) -> str:
            return f"{PUBLISHED[row][place]:.2f}" if row in PUBLISHED else table.NONE

        cells.append(Cell(title, accuracy, "%", "Test accuracy, mean ± deviation over seeds."))
        cells.append(Cell(f"{title}, published", published, "%"))
    cells.append(
        Cell("A training step", lambda row: spread(runs.of(row, "costs.seconds"), 0, 1e3), "ms",
             "Wall time, the median of a run; the machine was shared, so that it is rough.")
    )  # fmt: skip
    made = [table.sheet("Accuracy", ROWS, cells)]
    return [*made, *(strength(runs.where(row=row), row) for row in ("clean", "jiio"))]


def strength(runs: Runs, row: str) -> Sheet:
    """What the attacks do to the models of a row, and what they cost."""
    first: dict[str, Any] = runs[0]["attacks"] if runs else {}
    rival = next((name for name in reversed(first) if name.startswith("PGD")), CLEAN)

    def told(what: str, digits: int, scale: float = 1.0) -> Any:
        return lambda name: table.spread(of(runs, row, name, what), digits, scale)

    names = [name for name in first if name != CLEAN]
    return table.sheet(f"Attacks on the model trained on {ROWS[row][0]}", names, [
        Cell("Attack", lambda name: name),
        Cell("Cross-entropy", told("cross_entropy", 3), "",
             "On the test images, after an exact solve at the changed images."),
        Cell("Accuracy", told("accuracy", 1, 100), "%"),
        Cell("Of PGD-20's", lambda name: f"{ratio(runs, row, name, rival, 'cross_entropy'):.3f}", "",
             "Cross-entropy over that of PGD-20."),
        Cell("Time", told("seconds", 0, 1e3), "ms",
             "CPU time for all images at once, the median of repeats taken in turn; mean over seeds."),
        Cell("PGD-20's over it", lambda name: f"{ratio(runs, row, rival, name, 'seconds'):.1f}", "×",
             "Time of PGD-20 over this one's."),
        Cell("Evaluations", lambda name: f"{fmean(of(runs, row, name, 'evaluations')):.0f}", "",
             "Of the map, and products with its Jacobian, in whole-batch equivalents."),
        Cell("Step size", lambda name: f"{first[name]['step_size']:g}", "radii",
             "Chosen on validation images, the first seed's."),
        Cell("Tolerance", lambda name: f"{tolerance:g}" if (tolerance := first[name]["tolerance"]) else table.NONE, "",
             "Of PGD's solves, chosen likewise."),
    ])  # fmt: skip


def claims(config: AdversarialTableConfig, runs: Runs) -> list[Claim]:
    """The attacks' strength in their time, then what training against them gives."""
    kind = attacked(config, "jiio", 0)
    made = []
    rival = strongest(config, "PGD")
    for row in ("clean", "pgd", "jiio"):
        if not runs.where(row=row):
            continue
        names = [f"JIIO-{steps}" for steps in sorted(kind.jiio_steps)]
        measured = [
            (name, ratio(runs, row, name, rival, "cross_entropy"), ratio(runs, row, rival, name, "seconds"))
            for name in names
        ]
        words = "; ".join(f"{name} has {strong:.3f} of it, {fast:.1f} times as fast" for name, strong, fast in measured)
        made.append(
            Claim(
                f"On the model trained on {ROWS[row][0]}, JIIO attacks with at least 0.97 of the cross-entropy of "
                f"{rival}, at least 3 times as fast",
                words,
                any(strong >= 0.97 and fast >= 3 for _, strong, fast in measured),
            )
        )
        strong = [one for one in measured if one[1] >= 0.97]
        short = [
            (name, fast)
            for steps in sorted(kind.pgd_steps)
            if ratio(runs, row, name := f"PGD-{steps}", rival, "cross_entropy") >= 0.97
            for fast in [ratio(runs, row, rival, name, "seconds")]
        ]
        if strong and short:
            made.append(
                Claim(
                    "On the same model, the fastest JIIO of that strength is faster than the fastest PGD of that "
                    "strength, those of few and long steps included",
                    f"{short[0][0]} is {short[0][1]:.1f} times as fast as {rival}, and {strong[0][0]} "
                    f"{strong[0][2]:.1f} times",
                    strong[0][2] > short[0][1],
                )
            )
    if runs.couples("pgd", "jiio"):
        differences = {
            attack: 100 * fmean(runs.gaps("jiio", "pgd", f"attacks.{attack}.accuracy"))
            for attack in (CLEAN, rival, strongest(config, "JIIO"))
        }
        pairs = runs.couples("pgd", "jiio")
        costs = [fmean(pair[i]["costs.seconds"] for pair in pairs if pair[i]["costs"]) for i in (0, 1)]
        made.append(
            Claim(
                "Trained against JIIO, the model is as robust as against PGD-10, to a point, in less time",
                ", ".join(f"{attack} {value:+.1f} points" for attack, value in differences.items())
                + f"; a step takes {costs[0] / costs[1]:.1f} times less time",
                min(differences.values()) >= -1 and costs[1] < costs[0],
            )
        )
    return made


def protocol(config: AdversarialTableConfig, runs: Runs) -> str:
    """What was run, in words."""
    kind = attacked(config, "jiio", 0)
    one = kind.training
    model = "a convolutional model" if config.data == "mnist" else "a dense model"
    return (
        f"{config.data}, {model} tanh(Wz + Ux + b) of {one.channels} channels with a bound of {one.bound:g} on the "
        f"norm of W; balls of radius {one.radius:g} in the 2-norm of the pixels in [0, 1]. {one.optimization.steps} "
        f"steps of Adam on batches of {one.optimization.batch_size}; the weights are those of the best validation "
        f"accuracy under the attack that was trained against; {config.plan.seeds} seeds. Attacks have the step size of "
        f"most cross-entropy on {kind.tuning_images} validation images, of "
        f"{', '.join(f'{s:g}' for s in kind.step_sizes)} radii; PGD's solves begin at the last step's, and have the "
        f"loosest tolerance, of {', '.join(f'{t:g}' for t in kind.tolerances)}, that keeps "
        f"{100 * (1 - kind.tolerated):g} % of its cross-entropy. JIIO is damped as published and not accelerated. "
        f"{kind.attacked_images} test images at most, in eval mode, each attack timed {kind.repeats} times, all in "
        "turn."
    )


def notes(config: AdversarialTableConfig, runs: Runs) -> list[str]:
    """What a reader must know."""
    notes = [
        "The published rows are of MNIST and of another model; its time for PGD-20 is 4360 ms and for JIIO-80 1401 ms.",
        "Since attack and training are one minimum over maximum, the weights' gradient at the strongest change is that "
        "of the loss with the change held fixed (Danskin's theorem). By default it is taken at an exact solve, which "
        "begins at JIIO's state and costs a few evaluations: it is right for the change whatever the attack's own "
        "residual. The row named envelope takes state and adjoint as JIIO leaves them, with no further solve; its "
        "gradient is exact only so far as JIIO has converged.",
        "Accelerated by Anderson's method, JIIO comes to weaker attacks here, safeguarded by the cost though it is: "
        "the problem is not convex, and acceleration finds other stationary points.",
        "PGD whose steps are longer than the radius jumps from boundary to boundary, and where the ball is small is "
        "close to its final strength after a few of them: beside that, rather than beside PGD-20, JIIO gains little "
        "time or none, as the claims on the fastest PGD say.",
    ]
    if config.data == "digits":
        notes.insert(0, "8×8 digits and one minute of training a row: rows compare among themselves.")
    return notes


# -- figures -----------------------------------------------------------------------------------------------------------


def drawings(config: AdversarialTableConfig, runs: Runs, folders: Mapping[str, Run]) -> list[Drawing]:
    """Strength against time, and images of the first seed, as they are and attacked."""

    from torchimplicit.recipes.runtime import files

    if not runs:
        return []
    kind = attacked(config, "jiio", 0)
    rows = [row for row in ("clean", "pgd", "jiio") if runs.where(row=row)]
    groups = {"PGD": sorted(kind.pgd_steps), "JIIO": sorted(kind.jiio_steps)}
    figure, panels = axes(len(rows), width=4.2, height=3.6)
    for panel, row in zip(panels, rows, strict=True):
        for index, (label, steps) in enumerate(groups.items()):
            times = [1e3 * fmean(of(runs, row, f"{label}-{n}", "seconds")) for n in steps]
            strong = [fmean(of(runs, row, f"{label}-{n}", "cross_entropy")) for n in steps]
            panel.plot(times, strong, label=label, **style(index))
            for n, x, y in zip(steps, times, strong, strict=True):
                panel.annotate(str(n), (x, y), textcoords="offset points", xytext=(4, -10), fontsize=7.5)
        panel.set(xlabel="CPU time, ms", ylabel="cross-entropy", title=f"trained on {ROWS[row][0]}")
        panel.legend()
    made = [
        Drawing(
            "strength",
            figure,
            "The attacks' strength, after an exact solve, against the time for all test images; the numbers are steps. "
            "Means over the seeds.",
        )
    ]
    lines = []
    for row in ("clean", "jiio"):
        kept = [folders[line.name].path / "pictures.pt" for line in runs.where(row=row)]
        for file in [file for file in kept if file.is_file()][:1]:
            lines += [(row, name, *one) for name, one in files.load(file).items()]
    if not lines:
        return made
    count = len(lines[0][2])
    figure = canvas(1.05 * count + 1.6, 1.2 * len(lines))
    grid = figure.subplots(len(lines), count, squeeze=False)
    for axs, (row, name, images, answers) in zip(grid, lines, strict=True):
        for ax, image, answer in zip(axs, images, answers, strict=True):
            ax.imshow(image[0].numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.grid(visible=False)
            ax.set_title(str(int(answer)), fontsize=8, pad=2)
        axs[0].set_ylabel(f"trained on\n{ROWS[row][0]}\n{name}", fontsize=7, rotation=0, ha="right", va="center")
    caption = (
        "Test images as they are and attacked, with what the model takes each for: one trained on clean images, and "
        "one against JIIO. The first seed."
    )
    return [*made, Drawing("pictures", figure, caption)]


TABLE = table.published(
    globals(),
    title="Adversarial training by joint inference",
    source="Gurumurthy, Bai, Manchester, Kolter 2021, Joint inference and input optimization in equilibrium "
    "networks: Table 5 (MNIST), and the attack's time against projected gradient ascent.",
)
