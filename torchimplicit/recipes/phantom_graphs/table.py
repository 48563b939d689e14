"""The table: what its runs come to."""

from __future__ import annotations

from statistics import fmean, median, stdev

from torchimplicit.recipes.phantom_graphs.config import PhantomGraphsConfig
from torchimplicit.recipes.phantom_graphs.cost import StepCost
from torchimplicit.recipes.phantom_graphs.drawings import bars, lengths
from torchimplicit.recipes.phantom_graphs.jobs import LOOSE, chain, jobs, molecules
from torchimplicit.recipes.phantom_graphs.published import MAJORITY
from torchimplicit.recipes.phantom_graphs.published import TABLE as PUBLISHED
from torchimplicit.recipes.phantom_graphs.read import Found, Row, read
from torchimplicit.recipes.reproduce.runner import Reproduction
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.runtime.table import Claim, Drawing, Sheet, Summary, spread
from torchimplicit.recipes.tables import Column, Table

AIM = 0.95
"""Of the accuracy on the longest chains."""

ONE_ANSWER = 0.6
"""Points by which a fold's share of the larger class may differ from that of the whole set."""


def summarize(config: PhantomGraphsConfig, runs: dict[str, Run]) -> Summary:
    """See :class:`~torchimplicit.recipes.reproduce.runner.Reproduction`."""
    found = read(config, runs)
    drawings = []
    if any(row.accuracy for rows_ in found.sets.values() for row in rows_.values()):
        drawings.append(
            Drawing(
                "accuracy",
                bars(found),
                "Test accuracy, mean and standard deviation over the folds: ours with the epoch selected on "
                "validation, ours with the best test epoch as in the published runs, and the published figures. The "
                "line is what a constant answer scores.",
            )
        )
    if any(found.chains.values()):
        drawings.append(
            Drawing(
                "chains",
                lengths(found),
                "Test accuracy on directed chains against their length, exact gradient: mean over the seeds, and "
                "from the least to the largest. The class stands on the first node alone.",
            )
        )
    return Summary(
        title="Implicit graph networks with phantom gradients",
        source="Geng et al. 2021 (arXiv 2111.05177), Table 4: COX2 and PROTEINS. Gu et al. 2020 (arXiv 2009.06211), "
        "section 6.1: chains.",
        protocol=protocol(config),
        sheets=[accuracy_sheet(found), cost_sheet(found), chain_sheet(found)],
        claims=claims(config, found),
        drawings=drawings,
        notes=[*notes(config, found), *missing(config, runs)],
        runs=found.raw,
    )


TABLE = Reproduction(jobs, summarize)


def label(damping: float | None) -> str:
    """An estimator's name for people."""
    return "implicit" if damping is None else f"UPG, λ = {damping:g}"


def protocol(config: PhantomGraphsConfig) -> str:
    """What was run, in words."""
    parts = []
    for name in config.sets:
        chosen = molecules(config, name, 0, "implicit").optimization
        parts.append(f"{name} {chosen.steps} steps of {chosen.batch_size} graphs")
    first = molecules(config, "COX2", 0, "implicit").optimization
    steps = chain(config, 100, "identity", 0).optimization.steps
    return (
        "Three IGNN layers of 64, sum over the nodes, two-layer perceptron; Adam, learning rate "
        f"{first.learning_rate:g} ({first.schedule}); {', '.join(parts)}. {config.folds} stratified folds, one run "
        "each: a tenth of the graphs outside the tested part is set apart, and the weights with the least loss on it "
        "are tested. k = 5 steps of "
        f"the phantom gradients. Chains: 20 of each of two classes, one layer of 16, {steps} steps with all chains in "
        "each, 20 nodes to train on, 100 to select by and 200 to test on; every seed has nodes of its own; double "
        "precision, relative tolerance 1e-14 forward and backward unless said otherwise."
    )


def accuracy_sheet(found: Found) -> Sheet:
    """Table 4."""
    columns = [
        Column("Estimator"),
        Column("Ours", "%", "test accuracy at the epoch that the validation part selects, mean ± sd over folds"),
        Column("Ours, best test epoch", "%", "the same runs selected on the test part, as the published ones were"),
        Column("Published", "%"),
        Column("Against implicit", "points", "mean over folds of the difference, ± its standard error"),
        Column("Folds"),
    ]
    lines = []
    for name, rows_ in found.sets.items():
        lines.append([f"{name}: constant answer", f"{MAJORITY[name]:.1f}", "–", "–", "–", "–"])
        for row in rows_.values():
            published = PUBLISHED.get((name, row.damping))
            lines.append(
                [
                    f"{name}: {label(row.damping)}",
                    spread(list(row.accuracy.values()), scale=100),
                    spread(list(row.peeked.values()), scale=100),
                    str(published) if published else "–",
                    _difference_text(difference(row, rows_["implicit"])),
                    str(len(row.accuracy)),
                ]
            )
    return Sheet("Accuracy on graphs", Table(columns, lines))


def cost_sheet(found: Found) -> Sheet:
    """What a step costs."""
    columns = [
        Column("Estimator"),
        Column("Forward evaluations", "", "of the cells, over the three layers, a training step; mean over folds"),
        Column("Backward evaluations", "", "products with their Jacobians, likewise"),
        Column("Forward", "ms", "one batch at the same trained weights, all estimators in turn, median"),
        Column("Backward", "ms", "likewise"),
        Column("Step, × implicit", "", "time of both passes over that of the implicit row"),
    ]
    lines = []
    for name, rows_ in found.sets.items():
        timed = found.costs.get(name, {})
        for key, row in rows_.items():
            cost, base = timed.get(key), timed.get("implicit")
            ratio = "–"
            if cost is not None and base is not None:
                ratio = f"{_step(cost) / _step(base):.2f}"
            lines.append(
                [
                    f"{name}: {label(row.damping)}",
                    _number(row.forward),
                    _number(row.backward),
                    "–" if cost is None else f"{1000 * cost.forward_seconds:.0f}",
                    "–" if cost is None else f"{1000 * cost.backward_seconds:.0f}",
                    ratio,
                ]
            )
    return Sheet("Cost of a step", Table(columns, lines))


VARIANTS = {
    "identity": "near 0.8 I",
    "uniform": "uniform, as in the paper",
    "loose": f"near 0.8 I, tolerance {LOOSE:g}",
}


def chain_sheet(found: Found) -> Sheet:
    """The chains."""
    known = sorted({length for by_length in found.chains.values() for length in by_length})
    columns = [
        Column("Start of W"),
        *(Column(f"{length} nodes", "%", "mean ± sd over seeds" if length == known[0] else "") for length in known),
        Column("Seeds", "", "from the shortest to the longest chains"),
    ]
    lines = [
        [
            VARIANTS[variant],
            *(spread(by_length.get(length, []), scale=100) for length in known),
            ", ".join(str(len(by_length.get(length, []))) for length in known),
        ]
        for variant, by_length in found.chains.items()
    ]
    return Sheet("Accuracy on chains", Table(columns, lines))


def claims(config: PhantomGraphsConfig, found: Found) -> list[Claim]:
    """What was aimed at, and what came out."""
    made = []
    for name, rows_ in found.sets.items():
        there = {key: row for key, row in rows_.items() if row.accuracy and (name, row.damping) in PUBLISHED}
        for what, values in (
            ("selected on validation", {key: row.accuracy for key, row in there.items()}),
            ("selected on the test part, as published", {key: row.peeked for key, row in there.items()}),
        ):
            if not there:
                continue
            gaps = {
                key: 100 * fmean(values[key].values()) - PUBLISHED[name, row.damping].mean for key, row in there.items()
            }
            within = all(abs(gap) <= PUBLISHED[name, there[key].damping].deviation for key, gap in gaps.items())
            told = ", ".join(f"{label(there[key].damping)} {gap:+.1f}" for key, gap in gaps.items())
            made.append(Claim(f"{name}, {what}: every row within the published mean ± sd", f"{told} points", within))
        compared = {key: d for key, row in there.items() if (d := difference(row, rows_["implicit"])) is not None}
        constant, runs = _constant(name, rows_)
        if compared and 2 * constant <= runs:  # models that all answer alike would agree for no good reason
            worst = min(mean + 2 * error for mean, error in compared.values())
            told = ", ".join(f"{label(there[key].damping)} {_difference_text(d)}" for key, d in compared.items())
            made.append(
                Claim(
                    f"{name}: no phantom gradient is less accurate than the implicit one, by more than two standard "
                    "errors of the difference over folds",
                    f"{told} points",
                    worst >= 0,
                )
            )
        timed = found.costs.get(name, {})
        if base := timed.get("implicit"):
            ratios = {
                label(rows_[key].damping): _step(cost) / _step(base) for key, cost in timed.items() if cost is not base
            }
            made.append(
                Claim(
                    f"{name}: a step with a phantom gradient takes no longer than with the implicit one",
                    ", ".join(f"{row} × {ratio:.2f}" for row, ratio in ratios.items()),
                    all(ratio <= 1 for ratio in ratios.values()),
                )
            )
    longest = max(config.lengths, default=0)
    if accuracies := found.chains["identity"].get(longest):
        made.append(
            Claim(
                f"chains of {longest} nodes, W starting near 0.8 I: accuracy at least {AIM:g}",
                f"{fmean(accuracies):.3f}, least of {len(accuracies)} seeds {min(accuracies):.3f}",
                fmean(accuracies) >= AIM,
            )
        )
    return made


def notes(config: PhantomGraphsConfig, found: Found) -> list[str]:
    """What a reader must know."""
    made = [
        "The published figures are the mean over folds of each fold's best test epoch, which is an upper bound of what "
        "a model selected without the test part scores; the column 'best test epoch' selects in the same way, from as "
        "many epochs as were run here.",
        "The published code tests on a matrix in which every edge counts twice and trains on one in which it counts "
        "once; here both are the same.",
        "The maps contract strongly (the rows of W are projected on the L1 ball), so that the exact gradient needs few "
        "products, and there is little that a phantom gradient could save: its steps after the solve are evaluations "
        "of their own, counted as forward ones, and as many products go back through them.",
        "What arrives at the end of a chain of 100 nodes is about (2/3)^100 of what stands at its beginning. A "
        "residual that is small beside the whole state is larger than that: at an everyday tolerance both the solve "
        "and the gradient stop before the end is reached.",
        "PPI (published micro-F1: implicit 97.6, UPG 98.2 / 97.4 / 96.2) needs a GPU: recipe graphs-ppi.",
    ]
    if config.plan.scale == "cpu" and (config.passes or 0) < 200:
        passes = "60 of COX2 and 8 of PROTEINS" if config.passes is None else str(config.passes)
        made.insert(
            0, f"Training is short here: passes over the training part are {passes}, and the published ones are 200."
        )
    for name in config.sets:
        constant, total = _constant(name, found.sets[name])
        if 2 * constant > total:
            chosen = median(one["selected_step"] for key, one in found.raw.items() if key.startswith(name.lower()))
            steps = molecules(config, name, 0, "implicit").optimization.steps
            made.append(
                f"{name}: in {constant} of {total} runs the selected model scores what a constant answer does; "
                f"in the median the least validation loss is that of step {chosen:g} of {steps}. So it says nothing of "
                "the estimators."
            )
    if found.diverged:
        made.append(f"Not finished or diverged: {', '.join(found.diverged)}.")
    return made


def missing(config: PhantomGraphsConfig, runs: dict[str, Run]) -> list[str]:
    """A note where runs are not done yet; the cells above say of how many folds or seeds they are."""
    wanted = [job.name for job in jobs(config)]
    left = [name for name in wanted if name not in runs]
    if not left:
        return []
    shown = ", ".join(left[:6]) + (", ..." if len(left) > 6 else "")
    return [f"{len(left)} of {len(wanted)} runs are not done yet and left out: {shown}."]


def difference(row: Row, base: Row) -> tuple[float, float] | None:
    """Mean and standard error of the paired difference, in points; ``None`` with fewer than two folds, or of a row to
    itself."""
    both = sorted(row.accuracy.keys() & base.accuracy.keys())
    if row.damping == base.damping or len(both) < 2:
        return None
    gaps = [100 * (row.accuracy[fold] - base.accuracy[fold]) for fold in both]
    return fmean(gaps), stdev(gaps) / len(gaps) ** 0.5


def _constant(name: str, rows: dict[str, Row]) -> tuple[int, int]:
    """In how many runs the selected model scores what a constant answer does, and of how many."""
    scores = [100 * score for row in rows.values() for score in row.accuracy.values()]
    return sum(abs(score - MAJORITY[name]) < ONE_ANSWER for score in scores), len(scores)


def _difference_text(found: tuple[float, float] | None) -> str:
    return "–" if found is None else f"{found[0]:+.1f} ± {found[1]:.1f}"


def _step(cost: StepCost) -> float:
    return cost.forward_seconds + cost.backward_seconds


def _number(value: float) -> str:
    return "–" if value != value else f"{value:.1f}"
