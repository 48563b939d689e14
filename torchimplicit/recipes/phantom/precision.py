"""Table: phantom against exact gradients, over steps and damping and during training (Figs. 1 and 2 of Geng et al.
2021)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from torchimplicit.recipes.phantom.images import ImageConfig, cifar10, mnist
from torchimplicit.recipes.phantom.images import digits as bundled
from torchimplicit.recipes.phantom.layer import LABELS, Drawn, LayerConfig, LayerResults, looking
from torchimplicit.recipes.runtime import table
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.page import axes, style
from torchimplicit.recipes.runtime.settings import from_plain, option, positive
from torchimplicit.recipes.runtime.table import CaptionedFigure, Cell, Claim, Job, Plan, Runs, TitledTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from torchimplicit.recipes.runtime.run import Run

GradientName = Literal["implicit", "unrolled-phantom"]
WEIGHTS: tuple[Literal["gaussian", "orthogonal"], ...] = ("gaussian", "orthogonal")
TRAINED: dict[GradientName, str] = {
    "implicit": "trained by the exact gradient",
    "unrolled-phantom": "trained by UPG(5, 0.5)",
}

ROUNDING = 1e-9
"""Cosines that differ by less than this count as equal."""

SHOWN = ("npg-1-1", "npg-2-0.5", "upg-5-0.5", "npg-9-0.5", "adaptive-0.3", "adaptive-0.1", "unbiased-5-0.5")
"""The estimators in Fig. 2. NPG(5, 0.5) would nearly cover UPG(5, 0.5)."""

Layers = Mapping[str, list[LayerResults]]
"""The measurements on the layers of each kind, one per seed."""

LAYER = LayerConfig()
"""The layer that Fig. 1 measures, up to its weight and seed."""


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Fig. 1 on random layers of two kinds, and Fig. 2 during trainings of an MDEQ with the exact gradient and UPG."""

    data: Literal["digits", "mnist"] = "mnist"
    """Data set for Fig. 2. With --scale paper it is CIFAR-10."""

    data_dir: Path | None = None
    """Folder of the data. Default: download it. The digits come with scikit-learn."""

    training_steps: int = 300
    """Optimizer steps of each training, unless --scale paper."""

    looks: int = 12
    """Number of times the gradient is compared during a training."""

    plan: Plan = field(default_factory=Plan)

    def __post_init__(self) -> None:
        positive(self, "training_steps", "looks")
        if self.looks > self.training_steps:
            raise UserError(f"{option('looks')} is {self.looks}, more than {option('training_steps')}")


def training(config: PrecisionConfig, gradient: GradientName, seed: int) -> ImageConfig:
    """One training of the table."""
    if config.plan.scale == "paper":
        chosen = cifar10()
        optimization = replace(chosen.optimization, seed=seed)
    else:
        chosen, steps = bundled(), config.training_steps
        if config.data == "mnist":
            chosen = replace(mnist(), validation_images=1000, test_images=2000)
        every = max(1, steps // 3)
        optimization = replace(chosen.optimization, seed=seed, steps=steps, batch_size=64, validate_every=every)
    equilibria = replace(chosen.equilibria, gradient=gradient, backward_tolerance=1e-3, backward_steps=40)
    chosen = replace(chosen, data_dir=config.data_dir, optimization=optimization, equilibria=equilibria)
    return looking(chosen, max(1, optimization.steps // config.looks))


def jobs(config: PrecisionConfig) -> list[Job]:
    """All jobs: layers of both kinds and trainings with both gradients, for every seed."""
    planned: list[Job] = []
    for place, seed in enumerate(config.plan.all_seeds):
        for weight in WEIGHTS:
            layer, key = replace(LAYER, weight=weight, seed=seed), {"weight": weight, "seed": seed}
            planned.append(Job(f"layer_{weight}_{seed}", "phantom-layer", layer, key, f"layers/{weight}-{place}"))
        for gradient in TRAINED:
            one, name = training(config, gradient, seed), f"training_{gradient}_{seed}"
            recorded = f"trainings/{gradient}-{place}"
            planned.append(Job(name, "phantom-training", one, {"gradient": gradient, "seed": seed}, recorded))
    return planned


@dataclass(frozen=True)
class Measurement:
    """The gradient at one step of a training.

    Attributes:
        step: from 1 on.
        own: figures of the estimator that trains, the spectral radius, and how exact the exact gradient is.
        beside: those of the others, by name.
    """

    step: int
    own: dict[str, float]
    beside: dict[str, dict[str, float]]

    def figure(self, name: str) -> float:
        """``FIGURE`` of the training estimator, or ``ESTIMATOR/FIGURE``; NaN if it was not measured."""
        estimator, _, figure = name.rpartition("/")
        return (self.beside.get(estimator, {}) if estimator else self.own).get(figure, float("nan"))


def figures(config: PrecisionConfig, run: Run) -> Any:
    """A layer's measurements, or a training's history, whose last entry also has the test accuracy."""
    results = table.read("results.json")(config, run)
    if results is None or run.path.name.startswith("layer"):
        return results
    looks = [asdict(look) for look in looks_of(run)]
    if not looks:
        return None
    looks[-1]["accuracy"] = results["test"] and results["test"]["figures"]["accuracy"]
    return looks


def looks_of(run: Run) -> list[Measurement]:
    """The measurements in the run's log."""
    from torchimplicit.recipes.runtime.log import rows

    prefix = "gradient/task.model.equilibrium/"
    looks = []
    for row in rows(run.metrics):
        figures: dict[str, float] = {}
        beside: dict[str, dict[str, float]] = defaultdict(dict)
        for name, value in row.items():
            if name.startswith(prefix):
                estimator, _, figure = name.removeprefix(prefix).rpartition("/")
                (beside[estimator] if estimator else figures)[figure] = value
        if figures or beside:
            looks.append(Measurement(int(row["step"]), figures, dict(beside)))
    return looks


def layers(runs: Runs, weight: str) -> list[LayerResults]:
    """The measurements on the layers of a kind, one per seed."""
    return [from_plain(LayerResults, line.figures) for line in runs.where(weight=weight)]


def trainings(runs: Runs, gradient: str, late: bool = False) -> list[list[Measurement]]:
    """The measurements during every training with a gradient; ``late``: only of the second half."""
    trained = [
        [Measurement(x["step"], x["own"], x["beside"]) for x in line.figures] for line in runs.where(gradient=gradient)
    ]
    return [[look for look in looks if not late or look.step > looks[-1].step / 2] for looks in trained]


def flat(trainings: Iterable[list[Measurement]]) -> list[Measurement]:
    """The measurements of several trainings as one list."""
    return [look for looks in trainings for look in looks]


def mean(values: Iterable[float]) -> float:
    """The mean; NaN for an empty list."""
    listed = list(values)
    return fmean(listed) if listed else float("nan")


def sheets(config: PrecisionConfig, runs: Runs) -> Iterator[TitledTable]:
    """Tables: Fig. 1, results beyond it, and Fig. 2."""
    measured: Layers = {weight: layers(runs, weight) for weight in WEIGHTS}
    if any(measured.values()):
        yield _grid(measured)
        yield _adaptive(measured)
        yield _unbiased(measured)
    for gradient in TRAINED:
        if runs.where(gradient=gradient):
            yield _along(runs, gradient)


def _grid(measured: Layers) -> TitledTable:
    points = [(weight, name, damping) for weight in WEIGHTS for name in ("UPG", "NPG") for damping in LAYER.lambdas]

    def cosine(k: int) -> Any:
        def cell(point: tuple[str, str, float]) -> str:
            known = (p for one in measured[point[0]] for p in one.grid)
            return f"{mean(p.cosine for p in known if (p.estimator, p.damping, p.steps) == (*point[1:], k)):.4f}"

        return cell

    return table.sheet("Fig. 1: cosine similarity to the exact gradient on random layers", points, [
        Cell("Layer and estimator", lambda point: f"{point[0]}, {point[1]}, λ = {point[2]:g}", "",
             "Distribution of W before scaling, phantom gradient, and its damping λ. The columns have k steps (UPG) or "
             "terms (NPG); all cells are means over the seeds."),
        *(Cell[Any](f"k = {k}", cosine(k)) for k in LAYER.ks),
    ])  # fmt: skip


def _adaptive(measured: Layers) -> TitledTable:
    asked = {
        f"{weight}, {error:g}": [a for one in measured[weight] for a in one.adaptive if a.asked == error]
        for weight in WEIGHTS
        for error in LAYER.errors
    }

    def told(figure: str, digits: int) -> Any:
        return lambda name: table.spread([getattr(one, figure) for one in asked[name]], digits)

    return table.sheet("Beyond the paper: the adaptive phantom gradient on random layers", asked, [
        Cell("Layer and requested error", lambda name: name, "",
             "Distribution of W before scaling, and the relative error of the adjoint vector that the estimator is "
             "asked for, given ‖W‖₂ as the contraction factor."),
        Cell("Largest error", lambda name: f"{max((one.error for one in asked[name]), default=float('nan')):.2g}", "",
             "Relative error of the adjoint vector, the largest of any sample and seed."),
        Cell("k", told("steps", 1), "",
             "Steps that the estimator took: mean over the samples, then mean ± standard deviation over the seeds."),
        Cell("λ", told("damping", 2), "",
             "Damping that the estimator chose: mean over samples and steps, then mean ± standard deviation over the "
             "seeds."),
        Cell("Cosine", told("cosine", 5), "",
             "Cosine similarity of the gradient in W, U and b to the exact one: mean ± standard deviation over the "
             "seeds."),
    ])  # fmt: skip


def _unbiased(measured: Layers) -> TitledTable:
    def told(of: Callable[[Drawn], float], digits: int = 3) -> Callable[[str], str]:
        return lambda weight: table.spread([of(one.unbiased) for one in measured[weight]], digits)

    count = next(one.unbiased.draws for ones in measured.values() for one in ones)
    return table.sheet("Beyond the paper: the unbiased series on random layers", WEIGHTS, [
        Cell[str]("Weight", lambda weight: weight, "",
                  "Distribution of W before scaling. All cells are means ± standard deviations over the seeds."),
        Cell("Terms", told(lambda one: one.terms, 2), "", "Terms of the series, mean over the draws."),
        Cell("Cosine of a draw", told(lambda one: one.cosine), "",
             "Cosine similarity of a draw of the gradient to the exact one, mean over the draws."),
        Cell("Error of a draw", told(lambda one: one.error), "",
             "Relative error of a draw of the gradient, root mean square over the draws."),
        Cell(f"Error of the mean of {count} draws", told(lambda one: one.mean_error), "",
             "Relative error of the mean gradient of all draws."),
        Cell("Standard error of the mean", told(lambda one: one.error / one.draws**0.5), "",
             "Error of a draw divided by the square root of their number: the error of the mean that chance alone "
             "leaves."),
        Cell("Truncation error", told(lambda one: one.truncated_error), "",
             "Relative error of the plain Neumann series with as many terms as a draw has on average, rounded."),
    ])  # fmt: skip


def _along(runs: Runs, gradient: GradientName) -> TitledTable:
    every, late = flat(trainings(runs, gradient)), trainings(runs, gradient, late=True)

    def over(figure: str, digits: int) -> Any:
        def cell(name: str) -> str:
            if not any(figure in look.beside[name] for look in every):
                return table.NONE
            known = ((look.beside[name][figure] for look in looks if figure in look.beside[name]) for looks in late)
            return table.spread([mean(values) for values in known], digits)

        return cell

    def share(of: Callable[[dict[str, float]], float]) -> Any:
        return lambda name: f"{100 * mean(of(look.beside[name]) for look in every):.0f}"

    return table.sheet(f"Fig. 2: second half of training, {TRAINED[gradient]}", LABELS, [
        Cell("Estimator", lambda name: LABELS[name], "",
             "Each estimate is compared with the exact gradient at the same weights, batch and state. Cells are means "
             "over the comparisons in the second half of training, ± standard deviations over the seeds, except for "
             "the two shares."),
        Cell("Cosine", over("cosine", 3), "", "Cosine similarity to the exact gradient."),
        Cell("Norm ratio", over("norm_ratio", 2), "", "Norm of the estimate divided by that of the exact gradient."),
        Cell("Adjoint residual", over("adjoint_residual", 3), "",
             "‖u − (I − Jᵀ)g‖ / ‖u‖ over the whole batch, for the adjoint g that the estimate uses."),
        Cell("Ascent", share(lambda one: float(one["cosine"] > 0)), "%",
             "Share of the comparisons in the whole training at which the inner product with the exact gradient is "
             "positive."),
        Cell("Condition", share(lambda one: one["ascent"]), "%",
             "Share of the comparisons in the whole training at which the relative error is below 1, which implies "
             "ascent."),
        Cell("Products", over("products", 1), "",
             "Products with the Jacobian of the whole batch, until its slowest sample is done."),
        Cell("k", over("steps", 1), "", "Steps or terms of the estimator, mean over the samples."),
        Cell("λ", over("damping", 2), "",
             "Damping that the adaptive phantom gradient chose, mean over samples and steps."),
    ])  # fmt: skip


def claims(config: PrecisionConfig, runs: Runs) -> Iterator[Claim]:
    """The claims that can be tested with the available runs."""
    measured: Layers = {weight: layers(runs, weight) for weight in WEIGHTS}
    if any(measured.values()):
        yield from _of_layers(measured)
    for gradient in TRAINED:
        if runs.where(gradient=gradient):
            yield from _of_training(runs, gradient)


def _of_layers(measured: Layers) -> Iterator[Claim]:
    every = [one for ones in measured.values() for one in ones]
    residual, agreement = max(one.residual for one in every), min(one.agreement for one in every)
    yield Claim(
        "The fixed-point iterations reach a relative residual below 1e-5 on the layers",
        f"the largest one is {residual:.1g}",
        residual < 1e-5,
    )
    yield Claim(
        "Backpropagation through the iterations and implicit differentiation agree to a cosine above 0.9999",
        f"the smallest cosine is 1 − {1 - agreement:.1g}",
        agreement > 0.9999,
    )
    rising: list[bool] = []
    by_damping: list[bool] = []
    for ones in measured.values():
        points: dict[tuple[str, float], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for p in (p for one in ones for p in one.grid):
            points[p.estimator, p.damping][p.steps].append(p.cosine)
        curves = {key: [fmean(values) for values in by_k.values()] for key, by_k in points.items()}
        rising += [b - a > -ROUNDING for curve in curves.values() for a, b in pairwise(curve)]
        for name in ("UPG", "NPG"):
            ordered = [curves[key][1:] for key in sorted(curves) if key[0] == name]
            pairs = (pair for small, large in pairwise(ordered) for pair in zip(small, large, strict=True))
            by_damping += [b - a > -ROUNDING for a, b in pairs]
    yield Claim(
        "The cosine rises with k for every λ, for UPG and NPG (Fig. 1)",
        f"it does so in {sum(rising)} of {len(rising)} steps from one k of the grid to the next",
        all(rising),
    )
    yield Claim(
        "The cosine rises more slowly with k for smaller λ (Fig. 1)",
        f"the next larger λ is at least as precise at {sum(by_damping)} of {len(by_damping)} points of the grid",
        all(by_damping),
    )
    held = [(a.error, a.asked) for one in every for a in one.adaptive]
    yield Claim(
        "The adaptive phantom gradient keeps every sample's error below the requested one",
        f"the largest error is {max(error / asked for error, asked in held):.2f} of the requested one",
        all(error <= asked for error, asked in held),
    )
    ratios = [one.unbiased.mean_error / (one.unbiased.error / one.unbiased.draws**0.5) for one in every]
    ratio = fmean(value**2 for value in ratios) ** 0.5
    yield Claim(
        "The unbiased series has no bias beyond its noise: the error of the mean of all draws is below 1.5 standard "
        "errors",
        f"{ratio:.2f} standard errors (root mean square over the layers)",
        ratio < 1.5,
    )


def _of_training(runs: Runs, gradient: GradientName) -> Iterator[Claim]:
    late, name = flat(trainings(runs, gradient, late=True)), TRAINED[gradient]
    upg = [look.figure("upg-5-0.5/cosine") for look in flat(trainings(runs, gradient))]
    yield Claim(
        f"UPG(5, 0.5) is an ascent direction throughout the training of the model {name}",
        f"it is one at {sum(value > 0 for value in upg)} of {len(upg)} comparisons; its cosine is {mean(upg):.2f} on "
        f"average and {min(upg):.2f} at least",
        all(value > 0 for value in upg),
    )
    terms = [mean(look.figure(f"npg-{k}-0.5/cosine") for look in late) for k in (2, 5, 9)]
    yield Claim(
        f"NPG(k, 0.5) is more precise with more terms in the second half of training of the model {name}",
        f"the mean cosine with k = 2, 5, 9 is {', '.join(f'{value:.3f}' for value in terms)}",
        all(a < b for a, b in pairwise(terms)),
    )
    adaptive = [look.figure("adaptive-0.1/adjoint_residual") for look in late]
    yield Claim(
        "The adaptive phantom gradient keeps the adjoint residual of the batch at 0.1 or below, within 60 steps, in "
        f"the second half of training of the model {name}",
        f"it does so at {sum(value <= 0.1 for value in adaptive)} of {len(adaptive)} comparisons; the largest residual "
        f"is {max(adaptive):.2f}",
        all(value <= 0.1 for value in adaptive),
    )


def protocol(config: PrecisionConfig, runs: Runs) -> str:
    """Describe what was run, and how the figures were selected."""
    images = "CIFAR-10" if config.plan.scale == "paper" else {"mnist": "MNIST", "digits": "8×8 digits"}[config.data]
    chosen = training(config, "implicit", 0)
    return (
        f"Fig. 1: the layer is z = tanh(Wz + Ux + b) with {LAYER.size} states and {LAYER.samples} inputs. W is "
        f"Gaussian or orthogonal, scaled to ‖W‖₂ = {LAYER.norm:g}. The forward pass takes {LAYER.iterations} "
        "fixed-point iterations in double precision. The gradients in W, U and b are compared for a random cotangent. "
        f"Fig. 2: an MDEQ ({chosen.model}) is trained on {images}, by SGD in {chosen.optimization.steps} steps of "
        f"{chosen.optimization.batch_size} images, once with the exact gradient and once with UPG(5, 0.5). The solver "
        f"is Broyden's method with at most {chosen.equilibria.solver_steps} steps. At {config.looks} steps of each "
        "training, every estimator is compared with the exact gradient (GMRES to 1e-5) at the state that the solver "
        "returned, in the cell's parameters and its input. "
        f"Everything is repeated with {config.plan.seeds} seeds."
    )


def notes(config: PrecisionConfig, runs: Runs) -> Iterator[str]:
    """Caveats for the reader."""
    yield (
        "UPG and NPG are the same linear map where the fixed point is exact, as in Fig. 1. They differ in Fig. 2, "
        "where the solver stops at its step budget."
    )
    yield (
        "The adaptive phantom gradient bounds its error by its residual and the contraction factor. This bound is far "
        "from tight: the errors are well below the requested ones."
    )
    yield (
        "The unbiased series has a finite variance where the square of the spectral radius of λJ + (1 − λ)I is below "
        "the survival probability p. With one draw in each step it trades bias for noise, and its error in one step "
        "may exceed that of a truncated series."
    )
    every = {gradient: trainings(runs, gradient) for gradient in TRAINED if runs.where(gradient=gradient)}
    looks = [look for each in every.values() for look in flat(each)]
    if looks:
        longer = sum(look.figure("unbiased-5-0.5/norm_ratio") > 2 for look in looks)
        yield (
            "During training, the gradient of the unbiased series is more than twice as long as the exact one at "
            f"{longer} of {len(looks)} comparisons. A single sample with an infinite variance would explain that; it "
            "was not checked."
        )
    for gradient, each in every.items():
        first, late = [first_of[0] for first_of in each], flat(trainings(runs, gradient, late=True))
        radii, cosines = (
            [mean(look.figure(figure) for look in some) for some in (first, late)]
            for figure in ("spectral_radius", "upg-5-0.5/cosine")
        )
        yield (
            f"In the model {TRAINED[gradient]}, the Jacobian's spectral radius (median over samples, mean over seeds) "
            f"is {radii[0]:.2f} before the first step and {radii[1]:.2f} in the second half of training; the cosine of "
            f"UPG(5, 0.5) is {cosines[0]:.2f} and {cosines[1]:.2f}. The undamped series diverges where the spectral "
            "radius is above 1."
        )
    if worst := [look.own["exact_residual"] for look in looks if "exact_residual" in look.own]:
        yield f"The adjoint residual of the exact gradient is at most {max(worst):.1g} at every comparison."
    for gradient in every:
        last = [line.figures[-1].get("accuracy") for line in runs.where(gradient=gradient)]
        if accuracies := [accuracy for accuracy in last if accuracy is not None]:
            yield f"Test accuracy of the model {TRAINED[gradient]}: {table.spread(accuracies, 1, 100)} %."
    yield from table.missing(jobs(config), runs, "These runs were not measured")


def drawings(config: PrecisionConfig, runs: Runs, folders: Mapping[str, Run]) -> Iterator[CaptionedFigure]:
    """The figures for which there is data."""
    if any(runs.where(weight=weight) for weight in WEIGHTS):
        yield grid(runs)
    if any(runs.where(gradient=gradient) for gradient in TRAINED):
        yield along(runs)
        yield choices(runs)


def grid(runs: Runs) -> CaptionedFigure:
    """Fig. 1."""
    from matplotlib.ticker import MaxNLocator

    figure, panels = axes(len(WEIGHTS), width=4.6)
    for panel, weight in zip(panels, WEIGHTS, strict=True):
        points = [p for one in layers(runs, weight) for p in one.grid]
        for index, damping in enumerate(LAYER.lambdas if points else ()):
            line = [p for p in points if p.damping == damping]
            upg, npg = (
                [[p.cosine for p in line if (p.estimator, p.steps) == (name, k)] for k in LAYER.ks]
                for name in ("UPG", "NPG")
            )
            look = {**style(index), "marker": ""}
            table.band(panel, LAYER.ks, upg, f"λ = {damping:g}", look)
            panel.plot(LAYER.ks, [*map(fmean, npg)], "o", color=look["color"], markersize=4, fillstyle="none")
        panel.set(title=f"{weight} weight", xlabel="k, steps or terms", ylabel="cosine to the exact gradient")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].legend(loc="lower right")
    return CaptionedFigure(
        "cosine-over-steps-and-damping",
        figure,
        "Cosine similarity of the phantom gradients to the exact gradient on random layers whose weight W has spectral "
        f"norm {LAYER.norm:g}. Lines: UPG, mean over the seeds, with bands from minimum to maximum. Circles: NPG, "
        "which coincides with UPG where the fixed point is exact. After Geng et al. (2021), Fig. 1.",
    )


def along(runs: Runs) -> CaptionedFigure:
    """Fig. 2."""
    figure, panels = axes(len(TRAINED), width=4.9)
    for panel, gradient in zip(panels, TRAINED, strict=True):
        for index, name in enumerate(SHOWN):
            _over_steps(panel, runs, gradient, f"{name}/cosine", index, LABELS[name])
        panel.axhline(0, color="#9aa3af", linewidth=0.8)
        panel.set(title=TRAINED[gradient], xlabel="step", ylabel="cosine to the exact gradient")
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return CaptionedFigure(
        "cosine-along-training",
        figure,
        "Cosine similarity to the exact gradient during the training of an MDEQ, every estimator at the same weights, "
        "batches and equilibria. Lines are means over the seeds, bands go from minimum to maximum. An estimate above "
        "zero is an ascent direction. After Geng et al. (2021), Fig. 2; the adaptive and the unbiased series are not "
        "in the paper.",
    )


def choices(runs: Runs) -> CaptionedFigure:
    """The spectrum during training, and the choices of the adaptive phantom gradient."""
    figure, panels = axes(3, width=3.5)
    adaptive = "adaptive, residual 0.1"
    for panel, name, title, label in zip(
        panels,
        ("spectral_radius", "adaptive-0.1/steps", "adaptive-0.1/damping"),
        ("the Jacobian", adaptive, adaptive),
        ("spectral radius, median over samples", "chosen k, mean over samples", "chosen λ, mean over samples"),
        strict=True,
    ):
        for index, (gradient, trained) in enumerate(TRAINED.items()):
            _over_steps(panel, runs, gradient, name, index, trained)
        panel.set(title=title, xlabel="step", ylabel=label)
    panels[0].axhline(1, color="#9aa3af", linewidth=0.8)
    panels[0].legend(loc="upper right", fontsize=7.5)
    return CaptionedFigure(
        "spectrum-and-choices",
        figure,
        "Spectral radius of the Jacobian at the equilibrium during training (left); steps k (middle) and damping λ "
        "(right) that the adaptive phantom gradient chooses there for a relative residual of 0.1. Lines are means over "
        "the seeds, bands go from minimum to maximum.",
    )


def _over_steps(panel: Axes, runs: Runs, gradient: GradientName, figure: str, index: int, label: str) -> None:
    every = trainings(runs, gradient)
    steps = [look.step for look in every[0]] if every else []
    same = [looks for looks in every if [look.step for look in looks] == steps]
    if same:
        values = [[look.figure(figure) for look in together] for together in zip(*same, strict=True)]
        table.band(panel, steps, values, label, {**style(index), "markersize": 3})


TABLE = table.published(
    globals(),
    title="The precision of phantom gradients",
    source="Geng et al., On Training Implicit Models (NeurIPS 2021), Figs. 1 and 2, which are curves without "
    "tabulated numbers; the adaptive and the unbiased series are not in the paper.",
)
