"""The table ``phantom-precision``."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from torchimplicit.recipes.phantom_precision.claims import claims
from torchimplicit.recipes.phantom_precision.config import LayerConfig, PrecisionConfig, trainings
from torchimplicit.recipes.phantom_precision.drawing import drawings
from torchimplicit.recipes.phantom_precision.gathered import GRADIENTS, TRAINED, WEIGHTS, Gathered, gather, mean
from torchimplicit.recipes.phantom_precision.training import LABELS
from torchimplicit.recipes.plain import to_plain
from torchimplicit.recipes.reproduce.runner import Reproduction
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.runtime.table import Job, Sheet, Summary, spread
from torchimplicit.recipes.tables import Column, Table


def jobs(config: PrecisionConfig) -> list[Job]:
    """Layers of both kinds and trainings by both gradients, for every seed."""
    found = []
    for seed in config.plan.all_seeds:
        for weight in WEIGHTS:
            layer = replace(LayerConfig(), weight=weight, seed=seed)
            found.append(Job(f"layer_{weight}_{seed}", "phantom-layer", layer))
        for gradient in GRADIENTS:
            found.append(Job(f"training_{gradient}_{seed}", "phantom-training", trainings(config, gradient, seed)))
    return found


def summarize(config: PrecisionConfig, runs: dict[str, Run]) -> Summary:
    """See :class:`~torchimplicit.recipes.reproduce.runner.Reproduction`."""
    found = gather(runs, [job.name for job in jobs(config)])
    layer = LayerConfig()
    return Summary(
        title="The precision of phantom gradients",
        source="Geng et al., On Training Implicit Models (NeurIPS 2021), Figs. 1 and 2, which are curves without "
        "tabulated numbers; the adaptive and the unbiased series are not in the paper.",
        protocol=_protocol(config, layer),
        sheets=_sheets(found, layer),
        claims=claims(found),
        drawings=drawings(found, layer),
        notes=_notes(found),
        runs=_raw(found),
    )


TABLE = Reproduction(jobs, summarize)


def _protocol(config: PrecisionConfig, layer: LayerConfig) -> str:
    images = "CIFAR-10" if config.plan.scale == "paper" else {"mnist": "MNIST", "digits": "8×8 digits"}[config.data]
    chosen = trainings(config, "implicit", 0)
    return (
        f"Fig. 1: z = tanh(Wz + Ux + b) of {layer.size} numbers, {layer.samples} inputs, ‖W‖₂ = {layer.norm:g} with W "
        f"Gaussian or orthogonal, double precision, {layer.iterations} fixed-point iterations; the gradients in W, U "
        f"and b for a random cotangent. Fig. 2: an MDEQ ({chosen.model}) on {images}, {chosen.optimization.steps} "
        f"steps of {chosen.optimization.batch_size} images by SGD, trained by the exact gradient and by UPG(5, 0.5); "
        f"at {config.looks} steps every estimator is compared, at the state that the solver (Broyden, at most "
        f"{chosen.equilibria.solver_steps} steps) returned, with the exact gradient there (GMRES to 1e-5), in the "
        f"cell's parameters and its input. {config.plan.seeds} seeds."
    )


def _sheets(found: Gathered, layer: LayerConfig) -> list[Sheet]:
    sheets = []
    if any(found.layers.values()):
        sheets += [Sheet("Fig. 1: cosine on random layers", _grid(found, layer))]
        sheets += [Sheet("Beyond the paper: the adaptive phantom gradient on the layers", _adaptive(found, layer))]
        sheets += [Sheet("Beyond the paper: the unbiased series on the layers", _unbiased(found))]
    sheets += [
        Sheet(f"Fig. 2: second half of training, {TRAINED[gradient]}", _along(found, gradient))
        for gradient in GRADIENTS
        if found.trainings[gradient]
    ]
    return sheets


def _grid(found: Gathered, layer: LayerConfig) -> Table:
    rows = []
    for weight in WEIGHTS:
        for name in ("UPG", "NPG"):
            for damping in layer.lambdas:
                cells = []
                for k in layer.ks:
                    values = [
                        p.cosine
                        for one in found.layers[weight]
                        for p in one.grid
                        if (p.estimator, p.damping, p.steps) == (name, damping, k)
                    ]
                    cells.append(f"{mean(values):.4f}")
                rows.append([f"{weight}, {name}, λ = {damping:g}", *cells])
    return Table([Column("Cosine, mean over seeds"), *(Column(f"k = {k}") for k in layer.ks)], rows)


def _adaptive(found: Gathered, layer: LayerConfig) -> Table:
    rows = []
    for weight in WEIGHTS:
        for asked in layer.errors:
            ones = [a for one in found.layers[weight] for a in one.adaptive if a.asked == asked]
            rows.append(
                [
                    f"{weight}, {asked:g}",
                    f"{max((a.error for a in ones), default=float('nan')):.2g}",
                    spread([a.steps for a in ones]),
                    spread([a.damping for a in ones], 2),
                    spread([a.cosine for a in ones], 5),
                ]
            )
    columns = [
        Column("Error that is asked for", note="Relative, of the adjoint vector, with ‖W‖₂ as the contraction."),
        Column("Largest error of a sample"),
        Column("k", note="Mean over the samples."),
        Column("λ", note="Mean over samples and steps."),
        Column("Cosine"),
    ]
    return Table(columns, rows)


def _unbiased(found: Gathered) -> Table:
    rows = []
    for weight in WEIGHTS:
        ones = [one.unbiased for one in found.layers[weight]]
        rows.append(
            [
                weight,
                spread([one.terms for one in ones], 2),
                spread([one.cosine for one in ones], 3),
                spread([one.error for one in ones], 3),
                spread([one.mean_error for one in ones], 3),
                spread([one.error / one.draws**0.5 for one in ones], 3),
                spread([one.truncated_error for one in ones], 3),
            ]
        )
    count = next((one.unbiased.draws for ones in found.layers.values() for one in ones), 0)
    columns = [
        Column("Weight"),
        Column("Terms", note="Mean of the draws."),
        Column("Cosine of a draw", note="Mean."),
        Column("Error of a draw", note="Relative to the exact gradient, root mean square."),
        Column(f"Error of the mean of {count} draws"),
        Column(
            "Its standard error", note="The error of a draw over the root of their number: what no bias would leave."
        ),
        Column("Error at the same cost without chance", note="The plain series of as many terms, rounded: its bias."),
    ]
    return Table(columns, rows)


def _along(found: Gathered, gradient: str) -> Table:
    rows = []
    for name, label in LABELS.items():
        by_run = []
        for looks in found.trainings[gradient]:
            late = [look for look in looks if look.step > looks[-1].step / 2]
            by_run.append([look.beside[name] for look in late])

        def over(figure: str, runs: list[list[dict[str, float]]] = by_run) -> list[float]:
            return [mean(one[figure] for one in looks if figure in one) for looks in runs]

        everywhere = [look.beside[name] for look in found.looks(gradient)]
        rows.append(
            [
                label,
                spread(over("cosine"), 3),
                spread(over("norm_ratio"), 2),
                spread(over("adjoint_residual"), 3),
                f"{100 * mean(float(one['cosine'] > 0) for one in everywhere):.0f}",
                f"{100 * mean(one['ascent'] for one in everywhere):.0f}",
                spread(over("products"), 1),
                spread(over("steps"), 1),
                spread(over("damping"), 2) if any("damping" in one for one in everywhere) else "–",
            ]
        )
    columns = [
        Column("Estimator"),
        Column("Cosine", note="Mean over the looks of the second half, ± over the seeds; so are the others."),
        Column("Norm ratio"),
        Column("Adjoint residual", note="‖u − (I − Jᵀ)g‖ / ‖u‖ over the whole batch."),
        Column("Ascent", "%", "Share of all looks at which the inner product with the exact gradient is positive."),
        Column("Condition", "%", "Share of all looks at which the relative error is below 1, which implies ascent."),
        Column("Products", note="With the Jacobian, of the whole batch: a batch waits for its slowest sample."),
        Column("k", note="Mean over the samples."),
        Column("λ", note="Chosen, mean over samples and steps."),
    ]
    return Table(columns, rows)


def _notes(found: Gathered) -> list[str]:
    notes = [
        "UPG and NPG are the same linear map where the fixed point is exact (Fig. 1); they differ in Fig. 2, where the "
        "solver stops at its budget.",
        "The adaptive phantom gradient holds an error by its residual and the contraction, a bound that is far from "
        "tight: the errors that came out are well below those that were asked for.",
        "The unbiased series has a finite variance where the square of the spectral radius of λJ + (1 − λ)I is below "
        "p. At one draw a step it trades bias for noise, and its error in one step may be the larger one.",
    ]
    drawn = [look.figure("unbiased-5-0.5/norm_ratio") for gradient in GRADIENTS for look in found.looks(gradient)]
    if drawn:
        notes.append(
            f"Along training its gradient is over twice as long as the exact one at {sum(r > 2 for r in drawn)} of "
            f"{len(drawn)} looks; one sample for which the condition fails would do that, which was not checked."
        )
    for gradient in GRADIENTS:
        if not found.trainings[gradient]:
            continue
        first, late = [looks[0] for looks in found.trainings[gradient]], found.looks(gradient, late=True)
        radii, cosines = (
            [mean(look.figure(figure) for look in looks) for looks in (first, late)]
            for figure in ("spectral_radius", "upg-5-0.5/cosine")
        )
        notes.append(
            f"The model {TRAINED[gradient]}: at the first look, before the first step, the Jacobian's spectral radius "
            f"is {radii[0]:.2f} (median over samples, mean over seeds) and the cosine of UPG(5, 0.5) {cosines[0]:.2f}; "
            f"in the second half of training they are {radii[1]:.2f} and {cosines[1]:.2f}. Above 1 the undamped series "
            "diverges."
        )
    worst = [look.own["exact_residual"] for g in GRADIENTS for look in found.looks(g) if "exact_residual" in look.own]
    if worst:
        notes.append(f"The exact gradient's own adjoint residual is at most {max(worst):.1g} at every look.")
    for gradient in GRADIENTS:
        if found.accuracies[gradient]:
            notes.append(f"Test accuracy, {TRAINED[gradient]}: {spread(found.accuracies[gradient], 1, 100)} %.")
    if found.missing:
        notes.append(f"Not measured: {', '.join(found.missing)}.")
    return notes


def _raw(found: Gathered) -> dict[str, Any]:
    layers = {f"{weight}-{i}": asdict(one) for weight, ones in found.layers.items() for i, one in enumerate(ones)}
    looks = {
        f"{gradient}-{i}": [asdict(look) for look in looks]
        for gradient, trainings in found.trainings.items()
        for i, looks in enumerate(trainings)
    }
    return dict(_short(to_plain({"layers": layers, "trainings": looks})))


def _short(plain: Any) -> Any:
    """Plain data with its figures to five digits."""
    if isinstance(plain, dict):
        return {key: _short(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [_short(value) for value in plain]
    return float(f"{plain:.5g}") if isinstance(plain, float) else plain
