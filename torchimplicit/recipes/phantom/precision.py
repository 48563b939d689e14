"""Phantom against exact gradients: over steps and damping, and along training (Figs. 1 and 2 of Geng et al. 2021)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from torchimplicit.recipes.runtime.page import COLOURS, axes, style
from torchimplicit.recipes.runtime.settings import from_plain, option, positive
from torchimplicit.recipes.runtime.table import Cell, Claim, Drawing, Job, Plan, Runs, Sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from torchimplicit.recipes.runtime.run import Run

WEIGHTS: tuple[Literal["gaussian", "orthogonal"], ...] = ("gaussian", "orthogonal")
GRADIENTS: tuple[Literal["implicit", "unrolled-phantom"], ...] = ("implicit", "unrolled-phantom")
TRAINED = {"implicit": "trained by the exact gradient", "unrolled-phantom": "trained by UPG(5, 0.5)"}

ROUNDING = 1e-9
"""Cosines that differ by less are the same."""

SHOWN = ("npg-1-1", "npg-2-0.5", "upg-5-0.5", "npg-9-0.5", "adaptive-0.3", "adaptive-0.1", "unbiased-5-0.5")
"""What Fig. 2 draws; NPG(5, 0.5) nearly covers UPG(5, 0.5)."""


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Fig. 1 on random layers of two kinds, and Fig. 2 along trainings of an MDEQ by the exact gradient and by UPG."""

    data: Literal["digits", "mnist"] = "mnist"
    """The images of Fig. 2 at the CPU's scale; at the paper's they are CIFAR-10."""

    data_dir: Path | None = None
    """The folder that holds them. By default they are downloaded; the digits come with scikit-learn."""

    training_steps: int = 300
    """Of each training at the CPU's scale."""

    looks: int = 12
    """How often the gradient is looked at along a training."""

    plan: Plan = field(default_factory=Plan)

    def __post_init__(self) -> None:
        positive(self, "training_steps", "looks")
        if self.looks > self.training_steps:
            raise UserError(f"{option('looks')} is {self.looks}, more than {option('training_steps')}")


def trainings(config: PrecisionConfig, gradient: Literal["implicit", "unrolled-phantom"], seed: int) -> ImageConfig:
    """One training of the table."""
    if config.plan.scale == "paper":
        chosen = replace(cifar10(), data_dir=config.data_dir)
        optimization = replace(chosen.optimization, seed=seed)
    else:
        chosen = replace(mnist() if config.data == "mnist" else bundled(), data_dir=config.data_dir)
        if config.data == "mnist":
            chosen = replace(chosen, validation_images=1000, test_images=2000)
        steps = config.training_steps
        optimization = replace(
            chosen.optimization, seed=seed, steps=steps, batch_size=64, validate_every=max(1, steps // 3)
        )
    return looking(
        replace(
            chosen,
            optimization=optimization,
            equilibria=replace(chosen.equilibria, gradient=gradient, backward_tolerance=1e-3, backward_steps=40),
        ),
        max(1, optimization.steps // config.looks),
    )


def jobs(config: PrecisionConfig) -> list[Job]:
    """Layers of both kinds and trainings by both gradients, for every seed."""
    made = []
    key: dict[str, Any]
    for seed in config.plan.all_seeds:
        place = seed - config.plan.first_seed
        for weight in WEIGHTS:
            layer = replace(LayerConfig(), weight=weight, seed=seed)
            key = {"weight": weight, "seed": seed}
            made.append(Job(f"layer_{weight}_{seed}", "phantom-layer", layer, key, f"layers/{weight}-{place}"))
        for gradient in GRADIENTS:
            training = trainings(config, gradient, seed)
            key, name = {"gradient": gradient, "seed": seed}, f"training_{gradient}_{seed}"
            made.append(Job(name, "phantom-training", training, key, f"trainings/{gradient}-{place}"))
    return made


# -- what the runs come to ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
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
        """``FIGURE`` of the estimator that trains, or ``ESTIMATOR/FIGURE``; NaN where it was not measured."""
        estimator, _, figure = name.rpartition("/")
        return (self.beside.get(estimator, {}) if estimator else self.own).get(figure, float("nan"))


def figures(config: PrecisionConfig, run: Run) -> Any:
    """Of a layer what was measured; of a training the looks, the last of which also has the test's accuracy."""
    found = table.read("results.json")(config, run)
    if found is None or run.path.name.startswith("layer"):
        return found
    looks = [asdict(look) for look in looks_of(run)]
    if not looks:
        return None
    tested = found["test"]
    return [*looks[:-1], {**looks[-1], "accuracy": tested and tested["figures"]["accuracy"]}]


def looks_of(run: Run) -> list[Look]:
    """From the run's log."""
    from torchimplicit.recipes.runtime.fitting import rows

    prefix = "gradient/task.model.equilibrium/"
    found = []
    for row in rows(run.metrics):
        figures = {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}
        if not figures:
            continue
        beside: dict[str, dict[str, float]] = defaultdict(dict)
        for name, value in figures.items():
            if "/" in name:
                estimator, figure = name.split("/")
                beside[estimator][figure] = value
        found.append(Look(int(row["step"]), {n: v for n, v in figures.items() if "/" not in n}, dict(beside)))
    return found


@dataclass
class Gathered:
    """The runs that are there.

    Attributes:
        layers: by the kind of weight, one for each seed.
        trainings: the looks of each training, by the gradient that trains.
        accuracies: on the test images, likewise.
        missing: the names of runs that are not there, or have measured nothing.
    """

    layers: dict[str, list[LayerResults]] = field(default_factory=lambda: defaultdict(list))
    trainings: dict[str, list[list[Look]]] = field(default_factory=lambda: defaultdict(list))
    accuracies: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    missing: list[str] = field(default_factory=list)

    def looks(self, gradient: str, late: bool = False) -> list[Look]:
        """All looks at the trainings by a gradient; ``late``: those of the second half only."""
        found = []
        for training in self.trainings[gradient]:
            last = training[-1].step
            found += [look for look in training if not late or look.step > last / 2]
        return found


def gather(config: PrecisionConfig, runs: Runs) -> Gathered:
    """What the runs measured, by kind of layer and by training."""

    found = Gathered()
    for line in runs:
        if "weight" in line.key:
            found.layers[line["weight"]].append(from_plain(LayerResults, line.figures))
            continue
        gradient, looks = line["gradient"], line.figures
        found.trainings[gradient].append([Look(one["step"], one["own"], one["beside"]) for one in looks])
        if (accuracy := looks[-1].get("accuracy")) is not None:
            found.accuracies[gradient].append(accuracy)
    found.missing += [job.name for job in jobs(config) if job.name not in {line.name for line in runs}]
    return found


def mean(values: Iterable[float]) -> float:
    """NaN for none."""
    listed = list(values)
    return fmean(listed) if listed else float("nan")


# -- sheets ------------------------------------------------------------------------------------------------------------


def sheets(config: PrecisionConfig, runs: Runs) -> list[Sheet]:
    """Fig. 1, what is beyond it, and Fig. 2."""
    found, layer = gather(config, runs), LayerConfig()
    layers = [_grid(found, layer), _adaptive(found, layer), _unbiased(found)] if any(found.layers.values()) else []
    return layers + [_along(found, gradient) for gradient in GRADIENTS if found.trainings[gradient]]


def _grid(found: Gathered, layer: LayerConfig) -> Sheet:
    points = [(weight, name, damping) for weight in WEIGHTS for name in ("UPG", "NPG") for damping in layer.lambdas]

    def cosine(k: int) -> Any:
        def cell(point: tuple[str, str, float]) -> str:
            known = (p for one in found.layers[point[0]] for p in one.grid)
            return f"{mean(p.cosine for p in known if (p.estimator, p.damping, p.steps) == (*point[1:], k)):.4f}"

        return cell

    return table.sheet("Fig. 1: cosine on random layers", points, [
        Cell("Cosine, mean over seeds", lambda point: f"{point[0]}, {point[1]}, λ = {point[2]:g}"),
        *(Cell[Any](f"k = {k}", cosine(k)) for k in layer.ks),
    ])  # fmt: skip


def _adaptive(found: Gathered, layer: LayerConfig) -> Sheet:
    asked = {
        f"{weight}, {error:g}": [a for one in found.layers[weight] for a in one.adaptive if a.asked == error]
        for weight in WEIGHTS
        for error in layer.errors
    }

    def told(figure: str, digits: int) -> Any:
        return lambda name: table.spread([getattr(one, figure) for one in asked[name]], digits)

    def largest(name: str) -> str:
        return f"{max((one.error for one in asked[name]), default=float('nan')):.2g}"

    return table.sheet("Beyond the paper: the adaptive phantom gradient on the layers", asked, [
        Cell("Error that is asked for", lambda name: name, "",
             "Relative, of the adjoint vector, with ‖W‖₂ as the contraction."),
        Cell("Largest error of a sample", largest),
        Cell("k", told("steps", 1), "", "Mean over the samples."),
        Cell("λ", told("damping", 2), "", "Mean over samples and steps."),
        Cell("Cosine", told("cosine", 5)),
    ])  # fmt: skip


def _unbiased(found: Gathered) -> Sheet:
    def told(of: Callable[[Drawn], float], digits: int = 3) -> Callable[[str], str]:
        return lambda weight: table.spread([of(one.unbiased) for one in found.layers[weight]], digits)

    count = next((one.unbiased.draws for ones in found.layers.values() for one in ones), 0)
    return table.sheet("Beyond the paper: the unbiased series on the layers", WEIGHTS, [
        Cell[str]("Weight", lambda weight: weight),
        Cell("Terms", told(lambda one: one.terms, 2), "", "Mean of the draws."),
        Cell("Cosine of a draw", told(lambda one: one.cosine), "", "Mean."),
        Cell("Error of a draw", told(lambda one: one.error), "",
             "Relative to the exact gradient, root mean square."),
        Cell(f"Error of the mean of {count} draws", told(lambda one: one.mean_error)),
        Cell("Its standard error", told(lambda one: one.error / one.draws**0.5), "",
             "The error of a draw over the root of their number: what no bias would leave."),
        Cell("Error at the same cost without chance", told(lambda one: one.truncated_error), "",
             "The plain series of as many terms, rounded: its bias."),
    ])  # fmt: skip


def _along(found: Gathered, gradient: str) -> Sheet:
    def over(figure: str, digits: int) -> Any:
        def cell(name: str) -> str:
            late = [[look for look in looks if look.step > looks[-1].step / 2] for looks in found.trainings[gradient]]
            known = [[look.beside[name][figure] for look in looks if figure in look.beside[name]] for looks in late]
            return table.spread([mean(values) for values in known], digits)

        return cell

    def share(of: Callable[[dict[str, float]], float]) -> Any:
        return lambda name: f"{100 * mean(of(look.beside[name]) for look in found.looks(gradient)):.0f}"

    def damping(name: str) -> str:
        chosen = any("damping" in look.beside[name] for look in found.looks(gradient))
        return over("damping", 2)(name) if chosen else table.NONE

    return table.sheet(f"Fig. 2: second half of training, {TRAINED[gradient]}", LABELS, [
        Cell("Estimator", lambda name: LABELS[name]),
        Cell("Cosine", over("cosine", 3), "",
             "Mean over the looks of the second half, ± over the seeds; so are the others."),
        Cell("Norm ratio", over("norm_ratio", 2)),
        Cell("Adjoint residual", over("adjoint_residual", 3), "", "‖u − (I − Jᵀ)g‖ / ‖u‖ over the whole batch."),
        Cell("Ascent", share(lambda one: float(one["cosine"] > 0)), "%",
             "Share of all looks at which the inner product with the exact gradient is positive."),
        Cell("Condition", share(lambda one: one["ascent"]), "%",
             "Share of all looks at which the relative error is below 1, which implies ascent."),
        Cell("Products", over("products", 1), "",
             "With the Jacobian, of the whole batch: a batch waits for its slowest sample."),
        Cell("k", over("steps", 1), "", "Mean over the samples."),
        Cell("λ", damping, "", "Chosen, mean over samples and steps."),
    ])  # fmt: skip


# -- claims ------------------------------------------------------------------------------------------------------------


def claims(config: PrecisionConfig, runs: Runs) -> list[Claim]:
    """Those that can be tested with the runs that are there."""
    found = gather(config, runs)
    layers = [one for weight in WEIGHTS for one in found.layers[weight]]
    tested: list[Claim] = []
    if layers:
        tested += _of_layers(layers, found)
    for gradient in GRADIENTS:
        if found.trainings[gradient]:
            tested += _of_training(found, gradient)
    return tested


def _of_layers(layers: list[Any], found: Gathered) -> list[Claim]:
    residual, agreement = max(one.residual for one in layers), min(one.agreement for one in layers)
    rising, by_damping = [], []
    for weight in WEIGHTS:
        table: dict[tuple[str, float], dict[int, list[float]]] = {}
        for one in found.layers[weight]:
            for p in one.grid:
                table.setdefault((p.estimator, p.damping), {}).setdefault(p.steps, []).append(p.cosine)
        curves = {key: [mean(values) for values in by_k.values()] for key, by_k in table.items()}
        rising += [later - earlier for curve in curves.values() for earlier, later in pairwise(curve)]
        for name in ("UPG", "NPG"):
            ordered = [curves[key] for key in sorted(curves) if key[0] == name]
            by_damping += [
                b - a for small, large in pairwise(ordered) for a, b in zip(small[1:], large[1:], strict=True)
            ]
    held = [(a.error, a.asked) for one in layers for a in one.adaptive]
    ratios = [one.unbiased.mean_error / (one.unbiased.error / one.unbiased.draws**0.5) for one in layers]
    ratio = mean(value**2 for value in ratios) ** 0.5
    return [
        Claim(
            "The fixed-point iterations reach a relative residual below 1e-5 on the layers",
            f"at most {residual:.1g}",
            residual < 1e-5,
        ),
        Claim(
            "Backpropagation through the iterations and implicit differentiation agree to a cosine above 0.9999",
            f"at least 1 − {1 - agreement:.1g}",
            agreement > 0.9999,
        ),
        Claim(
            "The cosine rises with k for every λ, for UPG and NPG (Fig. 1)",
            f"{sum(step > -ROUNDING for step in rising)} of {len(rising)} steps of the grid do",
            all(step > -ROUNDING for step in rising),
        ),
        Claim(
            "It rises more slowly for small λ (Fig. 1)",
            f"at {sum(step > -ROUNDING for step in by_damping)} of {len(by_damping)} points a larger λ is at least as "
            "precise",
            all(step > -ROUNDING for step in by_damping),
        ),
        Claim(
            "The adaptive phantom gradient keeps every sample's error below what is asked for",
            f"the largest share of it that is used is {max(error / asked for error, asked in held):.2f}",
            all(error <= asked for error, asked in held),
        ),
        Claim(
            "The unbiased series has no bias that its noise would not explain",
            f"the mean's error is {ratio:.2f} standard errors (root mean square over the layers)",
            ratio < 1.5,
        ),
    ]


def _of_training(found: Gathered, gradient: str) -> list[Claim]:
    looks, late, name = found.looks(gradient), found.looks(gradient, late=True), TRAINED[gradient]

    def cosine(estimator: str) -> float:
        return mean(look.beside[estimator]["cosine"] for look in late)

    upg = [look.beside["upg-5-0.5"]["cosine"] for look in looks]
    terms = [cosine(estimator) for estimator in ("npg-2-0.5", "npg-5-0.5", "npg-9-0.5")]
    adaptive = [look.beside["adaptive-0.1"]["adjoint_residual"] for look in late]
    return [
        Claim(
            f"UPG(5, 0.5) is an ascent direction all along the training, {name}",
            f"at {sum(value > 0 for value in upg)} of {len(upg)} looks; its cosine is {mean(upg):.2f} on average and "
            f"{min(upg):.2f} at least",
            all(value > 0 for value in upg),
        ),
        Claim(
            f"More terms are more precise in the second half, {name}",
            "NPG(k, 0.5) with k = 2, 5, 9: " + ", ".join(f"{value:.3f}" for value in terms),
            all(a < b for a, b in pairwise(terms)),
        ),
        Claim(
            f"The adaptive phantom gradient keeps the batch's residual at 0.1 in the second half, {name}",
            f"at {sum(value <= 0.1 for value in adaptive)} of {len(adaptive)} looks, within 60 steps; at most "
            f"{max(adaptive):.2f}",
            all(value <= 0.1 for value in adaptive),
        ),
    ]


def protocol(config: PrecisionConfig, runs: Runs) -> str:
    """What was run, in words."""
    layer = LayerConfig()
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


def notes(config: PrecisionConfig, runs: Runs) -> list[str]:
    """What a reader must know."""
    found = gather(config, runs)
    made = [
        "UPG and NPG are the same linear map where the fixed point is exact (Fig. 1); they differ in Fig. 2, where the "
        "solver stops at its budget.",
        "The adaptive phantom gradient holds an error by its residual and the contraction, a bound that is far from "
        "tight: the errors that came out are well below those that were asked for.",
        "The unbiased series has a finite variance where the square of the spectral radius of λJ + (1 − λ)I is below "
        "p. At one draw a step it trades bias for noise, and its error in one step may be the larger one.",
    ]
    drawn = [look.figure("unbiased-5-0.5/norm_ratio") for gradient in GRADIENTS for look in found.looks(gradient)]
    if drawn:
        made.append(
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
        made.append(
            f"The model {TRAINED[gradient]}: at the first look, before the first step, the Jacobian's spectral radius "
            f"is {radii[0]:.2f} (median over samples, mean over seeds) and the cosine of UPG(5, 0.5) {cosines[0]:.2f}; "
            f"in the second half of training they are {radii[1]:.2f} and {cosines[1]:.2f}. Above 1 the undamped series "
            "diverges."
        )
    worst = [look.own["exact_residual"] for g in GRADIENTS for look in found.looks(g) if "exact_residual" in look.own]
    if worst:
        made.append(f"The exact gradient's own adjoint residual is at most {max(worst):.1g} at every look.")
    for gradient in GRADIENTS:
        if found.accuracies[gradient]:
            made.append(f"Test accuracy, {TRAINED[gradient]}: {table.spread(found.accuracies[gradient], 1, 100)} %.")
    if found.missing:
        made.append(f"Not measured: {', '.join(found.missing)}.")
    return made


# -- figures -----------------------------------------------------------------------------------------------------------


def drawings(config: PrecisionConfig, runs: Runs, folders: Mapping[str, Run]) -> list[Drawing]:
    """Those that there is data for."""
    found, layer = gather(config, runs), LayerConfig()
    drawn = []
    if any(found.layers.values()):
        drawn.append(grid(found, layer))
    if any(found.trainings.values()):
        drawn += [along(found), choices(found)]
    return drawn


def grid(found: Gathered, layer: LayerConfig) -> Drawing:
    """Fig. 1."""
    from matplotlib.ticker import MaxNLocator

    figure, panels = axes(len(WEIGHTS), width=4.6)
    for panel, weight in zip(panels, WEIGHTS, strict=True):
        for index, damping in enumerate(layer.lambdas):
            curves = {
                name: [
                    [p.cosine for p in one.grid if (p.estimator, p.damping) == (name, damping)]
                    for one in found.layers[weight]
                ]
                for name in ("UPG", "NPG")
            }
            look = {**style(index), "marker": ""}
            _band(panel, layer.ks, curves["UPG"], look, f"λ = {damping:g}")
            middle = [mean(values) for values in zip(*curves["NPG"], strict=True)]
            panel.plot(layer.ks[: len(middle)], middle, "o", color=look["color"], markersize=4, fillstyle="none")
        panel.set(title=f"{weight} weight", xlabel="k, steps or terms", ylabel="cosine to the exact gradient")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].legend(loc="lower right")
    return Drawing(
        "cosine-over-steps-and-damping",
        figure,
        "Cosine of the phantom gradients to the exact gradient on random layers whose weight has the spectral norm "
        f"{layer.norm:g}: UPG as lines (mean over the seeds, the band from least to largest), NPG as circles, which "
        "coincide with UPG where the fixed point is exact. After Geng et al. (2021), Fig. 1.",
    )


def along(found: Gathered) -> Drawing:
    """Fig. 2."""
    figure, panels = axes(len(GRADIENTS), width=4.9)
    for panel, gradient in zip(panels, GRADIENTS, strict=True):
        for index, name in enumerate(SHOWN):
            _over_steps(panel, found, gradient, f"{name}/cosine", index, LABELS[name])
        panel.axhline(0, color="#9aa3af", linewidth=0.8)
        panel.set(title=TRAINED[gradient], xlabel="step", ylabel="cosine to the exact gradient")
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return Drawing(
        "cosine-along-training",
        figure,
        "Cosine to the exact gradient along the training of an MDEQ, every estimator at the same weights, batches and "
        "equilibria: mean over the seeds, the band from least to largest. Above zero the estimate is an ascent "
        "direction. After Geng et al. (2021), Fig. 2; the adaptive and the unbiased series are beyond the paper.",
    )


def choices(found: Gathered) -> Drawing:
    """The spectrum along training, and what the adaptive phantom gradient makes of it."""
    figure, (radius, steps, damping) = axes(3, width=3.5)
    for index, gradient in enumerate(GRADIENTS):
        label = TRAINED[gradient]
        _over_steps(radius, found, gradient, "spectral_radius", index, label)
        for panel, figure_name in ((steps, "steps"), (damping, "damping")):
            _over_steps(panel, found, gradient, f"adaptive-0.1/{figure_name}", index, label)
    radius.axhline(1, color="#9aa3af", linewidth=0.8)
    radius.set(title="the Jacobian", xlabel="step", ylabel="spectral radius, median over samples")
    steps.set(title="adaptive, residual 0.1", xlabel="step", ylabel="chosen k, mean over samples")
    damping.set(title="adaptive, residual 0.1", xlabel="step", ylabel="chosen λ, mean over samples")
    radius.legend(loc="upper right", fontsize=7.5)
    return Drawing(
        "spectrum-and-choices",
        figure,
        "The Jacobian's spectral radius at the equilibrium along training, and how many steps the adaptive phantom "
        "gradient takes there for a relative residual of 0.1, with which damping.",
    )


def _over_steps(panel: Axes, found: Gathered, gradient: str, figure: str, index: int, label: str) -> None:
    trainings = found.trainings[gradient]
    if not trainings:
        return
    steps = [look.step for look in trainings[0]]
    curves = [[look.figure(figure) for look in looks] for looks in trainings if [look.step for look in looks] == steps]
    _band(panel, steps, curves, {**style(index), "color": COLOURS[index % len(COLOURS)], "markersize": 3}, label)


def _band(panel: Axes, x: Sequence[float], curves: Sequence[Sequence[float]], look: dict[str, Any], label: str) -> None:
    if not curves:
        return
    columns = list(zip(*curves, strict=True))
    panel.plot(x, [mean(column) for column in columns], label=label, **look)
    panel.fill_between(
        x, list(map(min, columns)), list(map(max, columns)), color=look["color"], alpha=0.12, linewidth=0
    )


TABLE = table.published(
    globals(),
    title="The precision of phantom gradients",
    source="Geng et al., On Training Implicit Models (NeurIPS 2021), Figs. 1 and 2, which are curves without "
    "tabulated numbers; the adaptive and the unbiased series are not in the paper.",
)
