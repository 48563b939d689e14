"""The table: what its runs come to."""

from __future__ import annotations

from statistics import fmean

from torchimplicit.recipes.jiio_adversarial.claims import claims
from torchimplicit.recipes.jiio_adversarial.config import AdversarialTableConfig, AttacksConfig
from torchimplicit.recipes.jiio_adversarial.drawings import drawings
from torchimplicit.recipes.jiio_adversarial.gathered import Found, of, ratio
from torchimplicit.recipes.jiio_adversarial.measure import CLEAN, read, strongest
from torchimplicit.recipes.jiio_adversarial.rows import PUBLISHED, ROWS, attacked, jobs
from torchimplicit.recipes.plain import to_plain
from torchimplicit.recipes.reproduce.runner import Reproduction
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.runtime.table import Sheet, Summary, spread
from torchimplicit.recipes.tables import Column, Table
from torchimplicit.recipes.training.results import Results


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
        claims=claims(kind, found, trained),
        drawings=drawings(kind, found, there),
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
            line.append(spread(of(found, row, attack, "accuracy"), 1, 100))
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
        strong, times = of(found, row, name, "cross_entropy"), of(found, row, name, "seconds")
        rows.append(
            [
                name,
                spread(strong, 3),
                spread(of(found, row, name, "accuracy"), 1, 100),
                f"{ratio(found, row, name, rival, 'cross_entropy'):.3f}",
                spread(times, 0, 1e3),
                f"{ratio(found, row, rival, name, 'seconds'):.1f}",
                f"{fmean(of(found, row, name, 'evaluations')):.0f}",
                f"{one.step_size:g}",
                f"{one.tolerance:g}" if one.tolerance else "–",
            ]
        )
    return Table(columns, rows)


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
