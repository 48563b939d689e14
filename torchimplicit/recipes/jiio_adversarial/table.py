"""The table ``jiio-adversarial``: its jobs, and what they come to."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure

from torchimplicit.recipes.jiio_adversarial.config import AdversarialTableConfig, AttacksConfig, digits, mnist
from torchimplicit.recipes.jiio_adversarial.measure import CLEAN, Strength, read, strongest
from torchimplicit.recipes.plain import to_plain
from torchimplicit.recipes.plotting import axes, style
from torchimplicit.recipes.reproduce.jobs import Job
from torchimplicit.recipes.reproduce.record import Claim, Sheet, spread
from torchimplicit.recipes.reproduce.runner import Drawing, Reproduction, Summary
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.tables import Column, Table
from torchimplicit.recipes.training.results import Results

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "clean": ("clean images", {"adversary": "none"}),
    "pgd": ("PGD-10", {"adversary": "pgd", "attack_steps": 10, "attack_step_size": 0.3}),
    "jiio": ("JIIO-20", {"adversary": "jiio"}),
    "envelope": ("JIIO-20, envelope", {"adversary": "jiio", "attack_gradient": "envelope"}),
}
"""What is trained on: a label, and the settings."""

PUBLISHED = {"pgd": (99.18, 96.53, 95.74), "jiio": (99.32, 95.74, 96.63)}
"""Gurumurthy et al. 2021, Table 5, MNIST: clean, attacked by PGD, attacked by JIIO, in percent."""

Found = dict[tuple[str, int], dict[str, Strength]]


def attacked(config: AdversarialTableConfig, row: str, seed: int) -> AttacksConfig:
    """One run's settings."""
    base = digits() if config.data == "digits" else mnist()
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
        Job(f"{row}-seed{seed}", "jiio-adversarial-attacks", attacked(config, row, seed))
        for seed in config.plan.all_seeds
        for row in ROWS
    ]


def summarize(config: AdversarialTableConfig, runs: dict[str, Run]) -> Summary:
    """The table of what is there."""
    there = {
        (row, seed): runs[name]
        for row in ROWS
        for seed in config.plan.all_seeds
        if (name := f"{row}-seed{seed}") in runs and (runs[name].path / "attacks.json").is_file()
    }
    found = {key: read(run) for key, run in there.items()}
    trained = {key: Results.of(run) for key, run in there.items()}
    kind = attacked(config, "jiio", 0)
    return Summary(
        title="Adversarial training by joint inference",
        source=(
            "Gurumurthy, Bai, Manchester, Kolter 2021, Joint inference and input optimization in equilibrium "
            "networks: Table 5 (MNIST), and the attack's time against projected gradient ascent."
        ),
        protocol=_protocol(config, kind),
        sheets=[
            Sheet("Accuracy", _accuracy(kind, found, trained)),
            *(
                Sheet(f"Attacks on the model trained on {ROWS[row][0]}", _strength(found, row))
                for row in ("clean", "jiio")
            ),
        ],
        claims=_claims(kind, found, trained),
        drawings=_drawings(kind, found, there),
        notes=_notes(config),
        runs={
            f"{row}-seed{seed}": {
                "attacks": to_plain(found[row, seed]),
                "validations": to_plain(trained[row, seed].validations),
                "seconds": trained[row, seed].seconds,
                "costs": to_plain(trained[row, seed].costs),
            }
            for row, seed in there
        },
    )


def _of(found: Found, row: str, attack: str, what: str) -> list[float]:
    return [getattr(one[attack], what) for (own, _), one in found.items() if own == row and attack in one]


def _accuracy(kind: AttacksConfig, found: Found, trained: dict[tuple[str, int], Results]) -> Table:
    pgd, jiio = strongest(kind, "PGD"), strongest(kind, "JIIO")
    columns = [Column("Trained on")]
    for title in ("Clean", f"Under {pgd}", f"Under {jiio}"):
        columns += [
            Column(title, "%", "Test accuracy, mean ± deviation over seeds."),
            Column(f"{title}, published", "%"),
        ]
    columns.append(
        Column("A training step", "ms", "Wall time, the median of a run; the machine was shared, so that it is rough.")
    )
    rows = []
    for row, (label, _) in ROWS.items():
        line = [label]
        for place, attack in enumerate((CLEAN, pgd, jiio)):
            line.append(spread(_of(found, row, attack, "accuracy"), 1, 100))
            line.append(f"{PUBLISHED[row][place]:.2f}" if row in PUBLISHED else "–")
        costs = [one.costs.seconds for (own, _), one in trained.items() if own == row and one.costs is not None]
        rows.append([*line, spread(costs, 0, 1e3)])
    return Table(columns, rows)


def _strength(found: Found, row: str) -> Table:
    columns = [
        Column("Attack"),
        Column("Cross-entropy", "", "On the test images, after an exact solve at the changed images."),
        Column("Accuracy", "%"),
        Column("Of PGD-20's", "", "Cross-entropy over that of PGD-20."),
        Column("Time", "ms", "CPU time for all images at once, the median of repeats taken in turn; mean over seeds."),
        Column("PGD-20's over it", "×", "Time of PGD-20 over this one's."),
        Column("Evaluations", "", "Of the map, and products with its Jacobian, in whole-batch equivalents."),
        Column("Step size", "radii", "Chosen on validation images, the first seed's."),
        Column("Tolerance", "", "Of PGD's solves, chosen likewise."),
    ]
    first = next((one for (own, _), one in found.items() if own == row), {})
    rival = next((name for name in reversed(first) if name.startswith("PGD")), CLEAN)
    rows = []
    for name, one in first.items():
        if name == CLEAN:
            continue
        strong, times = _of(found, row, name, "cross_entropy"), _of(found, row, name, "seconds")
        rows.append(
            [
                name,
                spread(strong, 3),
                spread(_of(found, row, name, "accuracy"), 1, 100),
                f"{_ratio(found, row, name, rival, 'cross_entropy'):.3f}",
                spread(times, 0, 1e3),
                f"{_ratio(found, row, rival, name, 'seconds'):.1f}",
                f"{fmean(_of(found, row, name, 'evaluations')):.0f}",
                f"{one.step_size:g}",
                f"{one.tolerance:g}" if one.tolerance else "–",
            ]
        )
    return Table(columns, rows)


def _ratio(found: Found, row: str, one: str, other: str, what: str) -> float:
    """Mean over the seeds of a figure of one attack over that of another."""
    pairs = zip(_of(found, row, one, what), _of(found, row, other, what), strict=True)
    return fmean(a / b for a, b in pairs)


def _claims(kind: AttacksConfig, found: Found, trained: dict[tuple[str, int], Results]) -> list[Claim]:
    made = []
    rival = strongest(kind, "PGD")
    for row in ("clean", "pgd", "jiio"):
        if not any(own == row for own, _ in found):
            continue
        names = [f"JIIO-{steps}" for steps in sorted(kind.jiio_steps)]
        measured = [
            (name, _ratio(found, row, name, rival, "cross_entropy"), _ratio(found, row, rival, name, "seconds"))
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
            if _ratio(found, row, name := f"PGD-{steps}", rival, "cross_entropy") >= 0.97
            for fast in [_ratio(found, row, rival, name, "seconds")]
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
    both = [seed for row, seed in found if row == "pgd" and ("jiio", seed) in found]
    if both:
        differences = {
            attack: 100 * fmean(found["jiio", s][attack].accuracy - found["pgd", s][attack].accuracy for s in both)
            for attack in (CLEAN, rival, strongest(kind, "JIIO"))
        }
        costs = {
            row: fmean(c.seconds for s in both if (c := trained[row, s].costs) is not None) for row in ("pgd", "jiio")
        }
        made.append(
            Claim(
                "Trained against JIIO, the model is as robust as against PGD-10, to a point, in less time",
                ", ".join(f"{attack} {value:+.1f} points" for attack, value in differences.items())
                + f"; a step takes {costs['pgd'] / costs['jiio']:.1f} times less time",
                min(differences.values()) >= -1 and costs["jiio"] < costs["pgd"],
            )
        )
    return made


def _drawings(kind: AttacksConfig, found: Found, runs: dict[tuple[str, int], Run]) -> list[Drawing]:
    if not found:
        return []
    rows = [row for row in ("clean", "pgd", "jiio") if any(own == row for own, _ in found)]
    figure, panels = axes(len(rows), width=4.2, height=3.6)
    for panel, row in zip(panels, rows, strict=True):
        groups = {
            "PGD": [f"PGD-{steps}" for steps in sorted(kind.pgd_steps)],
            "JIIO": [f"JIIO-{steps}" for steps in sorted(kind.jiio_steps)],
        }
        for index, (label, names) in enumerate(groups.items()):
            times = [1e3 * fmean(_of(found, row, name, "seconds")) for name in names]
            strong = [fmean(_of(found, row, name, "cross_entropy")) for name in names]
            panel.plot(times, strong, label=label, **style(index))
            for name, x, y in zip(names, times, strong, strict=True):
                panel.annotate(name.split("-")[1], (x, y), textcoords="offset points", xytext=(4, -10), fontsize=7.5)
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
    shown = _pictures(runs)
    return [*made, shown] if shown is not None else made


def _pictures(runs: dict[tuple[str, int], Run]) -> Drawing | None:
    """Images of the first seed, as they are and attacked."""
    chosen = {row: run for (row, _), run in reversed(list(runs.items())) if (run.path / "pictures.pt").is_file()}
    lines = [
        (row, name, *pictures)
        for row in ("clean", "jiio")
        if row in chosen
        for name, pictures in torch.load(chosen[row].path / "pictures.pt", weights_only=True).items()
    ]
    if not lines:
        return None
    columns = len(lines[0][2])
    figure = Figure(figsize=(1.05 * columns + 1.6, 1.2 * len(lines)), layout="constrained")
    grid = figure.subplots(len(lines), columns, squeeze=False)
    for panels, (row, name, images, answers) in zip(grid, lines, strict=True):
        for place, (panel, image, answer) in enumerate(zip(panels, images, answers, strict=True)):
            panel.imshow(image[0].numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            panel.grid(visible=False)
            panel.set_title(str(int(answer)), fontsize=8, pad=2)
            if not place:
                panel.set_ylabel(f"trained on\n{ROWS[row][0]}\n{name}", fontsize=7, rotation=0, ha="right", va="center")
    return Drawing(
        "pictures",
        figure,
        "Test images as they are and attacked, with what the model takes each for: one trained on clean images, and "
        "one against JIIO. The first seed.",
    )


def _protocol(config: AdversarialTableConfig, kind: AttacksConfig) -> str:
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


def _notes(config: AdversarialTableConfig) -> list[str]:
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


TABLE = Reproduction(jobs, summarize)
