"""The table: what its runs come to."""

from __future__ import annotations

import itertools
from statistics import fmean

from torchimplicit.recipes.jiio.curves import JOINT, Curves
from torchimplicit.recipes.jiio.nested import METHODS
from torchimplicit.recipes.jiio.pictures import grid
from torchimplicit.recipes.jiio_generation.config import JiioGenerationConfig
from torchimplicit.recipes.jiio_generation.drawing import LABELS, against_time
from torchimplicit.recipes.jiio_generation.jobs import LONGER, SIZES, Model, jobs, one
from torchimplicit.recipes.jiio_generation.read import Found, at, overtaking, read
from torchimplicit.recipes.reproduce.runner import Reproduction
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.runtime.table import Claim, Drawing, Sheet, Summary, spread
from torchimplicit.recipes.tables import Column, Table

AIMS = (9.0, 3.5)
"""Times less CPU time than Adam with ``LONGEST`` steps, to the same loss: the aim, and the least that was published."""

LONGEST = 40

PUBLISHED_FID = {"jiio": (46.82, 32.52), "vae": (48.12, 39.12)}
"""The same: CelebA 64×64, generation and reconstruction."""

NAMES = {"jiio": "Decoder", "vae": "Variational autoencoder", "wide": "Wider decoder"}


def summarize(config: JiioGenerationConfig, runs: dict[str, Run]) -> Summary:
    """See :class:`~torchimplicit.recipes.reproduce.runner.Reproduction`."""
    found = read(config, runs)
    drawings = []
    for size, measured in timed(found).items():
        if not measured:
            continue
        drawings.append(
            Drawing(
                f"curves-{size}",
                against_time(measured),
                f"{NAMES[size]}: loss of a batch of {one(config, size, 0).curve_images} test images against CPU time, "
                "after an exact solve at the latents found; means over seeds (faint: each seed). Numbers are steps.",
            )
        )
    for model, pictures in found.pictures.items():
        if model == "wide":
            continue
        drawings.append(Drawing(f"images-{model}", grid(pictures), f"{NAMES[model]}: {config.data}, not selected."))
    return Summary(
        title="Joint inference and input optimization: a decoder without an encoder",
        source="Gurumurthy et al. 2021 (arXiv 2111.13236): Fig. 3 and the tables of generation and time.",
        protocol=protocol(config),
        sheets=[pace_sheet(found), curve_sheet(found), image_sheet(found)],
        claims=claims(found),
        drawings=drawings,
        notes=notes(config, found),
        runs=found.raw,
    )


TABLE = Reproduction(jobs, summarize)


def timed(found: Found) -> dict[Model, list[Curves]]:
    """The measurements of time that are there."""
    return {size: found.curves[size] for size in SIZES if found.curves[size]}


def protocol(config: JiioGenerationConfig) -> str:
    """What was run, in words."""
    usual = one(config, "jiio", config.plan.first_seed)
    return (
        f"{config.data}; {usual.decoder.kind} equilibrium decoder, latent {usual.decoder.latent}, {sizes(config)}; "
        f"Adam, rate {usual.optimization.learning_rate:g} (wider: a third), "
        f"{usual.optimization.steps} steps of {usual.optimization.batch_size} images, each with a joint solve of "
        f"{usual.joint.joint_steps} steps (Anderson, memory {usual.joint.joint_memory}, "
        f"regularization {usual.joint.joint_regularization:g}; the loss a sum over pixels, as "
        "published, step sizes as for their mean) and the gradient of the envelope "
        "theorem; the weights with the least validation error are tested. The autoencoder has the same "
        f"equilibrium decoder, an encoder with one hidden layer of {usual.encoder_width}, the exact implicit gradient, "
        f"and {LONGER} times as many steps, which take about as long. Time: {usual.curve_images} test images at the "
        f"trained weights, eval mode, one thread, CPU time of the process, median of {usual.curve_repeats} "
        "repeats in which all take turns; both start from zero. Nested optimization "
        "starts every equilibrium solve from the last one, by plain iteration, and solves the adjoint "
        "system by GMRES; its step size and its tolerance (the loosest that costs at most 1 % of the loss), and the "
        "step size and damping of the joint solve, are tuned on validation images for every seed. The loss is always "
        "that of an exact equilibrium at the latents found."
    )


def sizes(config: JiioGenerationConfig) -> str:
    """Of the decoders."""
    small, wide = (one(config, model, 0).decoder for model in SIZES)
    if small.kind == "mlp":
        return f"a state of {small.width}, in the wider one {wide.width}"
    return f"{small.channels} channels, in the wider one {wide.channels}"


def pace_sheet(found: Found) -> Sheet:
    """How much sooner the joint solve is there."""
    columns = [
        Column("Nested"),
        Column("Steps"),
        Column("Its loss", "", "mean ± sd over seeds"),
        Column("Its time", "ms"),
        Column("Joint steps", "", "of the cheapest joint solve with the same loss or a lower one, each seed"),
        Column("Its time", "ms", "of that joint solve"),
        Column("Ratio", "×", "nested time over joint time to the same loss or a lower one, mean ± sd over seeds"),
        Column(
            "Ratio at as many steps", "×", "both with so many steps; published for 40: 8.9, rivals timed in train mode"
        ),
    ]
    lines = []
    for size, measured in timed(found).items():
        for method, steps in itertools.product(METHODS, (10, 20, LONGEST)):
            nested = [at(c, method, steps) for c in measured]
            better = [overtaking(c, method, steps) for c in measured]
            there = [b for b in better if b is not None]
            lines.append(
                [
                    f"{NAMES[size]}: {LABELS[method]}",
                    str(steps),
                    spread([loss for _, loss in nested], 5),
                    spread([seconds for seconds, _ in nested], 0, 1000),
                    ", ".join("–" if b is None else str(b.steps) for b in better) or "–",
                    spread([b.seconds for b in there], 0, 1000),
                    spread([b.ratio for b in there], 1),
                    spread([at(c, method, steps)[0] / at(c, JOINT, steps)[0] for c in measured], 1),
                ]
            )
    return Sheet("To the same loss", Table(columns, lines))


def curve_sheet(found: Found) -> Sheet:
    """Joint inference by steps."""
    columns = [
        Column("Joint steps"),
        Column("Loss", "", "after an exact solve, mean ± sd over seeds"),
        Column("Time", "ms", "CPU"),
    ]
    lines = [
        [
            f"{NAMES[size]}: {n}",
            spread([at(c, JOINT, n)[1] for c in measured], 5),
            spread([at(c, JOINT, n)[0] for c in measured], 0, 1000),
        ]
        for size, measured in timed(found).items()
        for n in sorted({p.steps for c in measured for p in c.points if p.method == JOINT})
    ]
    return Sheet("Joint inference", Table(columns, lines))


def image_sheet(found: Found) -> Sheet:
    """The images."""
    columns = [
        Column("Model"),
        Column("Reconstruction", "", "mean squared error of a pixel on the test images, after an exact solve"),
        Column("Fréchet, new images", "", "latents from a Gaussian mixture fitted on the training images' latents"),
        Column("Fréchet, one Gaussian", "", "likewise, one Gaussian"),
        Column("Fréchet, prior", "", "latents from the autoencoder's own prior"),
        Column("Fréchet, reconstructions"),
        Column("FID published", "", "new images / reconstructions, CelebA: another metric, on other images"),
    ]
    lines = []
    for model, generated in found.generated.items():
        priors = [g.prior for g in generated if g.prior is not None]
        lines.append(
            [
                NAMES[model],
                spread(found.mse[model], 5),
                spread([g.mixture for g in generated], 3),
                spread([g.gaussian for g in generated], 3),
                spread(priors, 3),
                spread([g.reconstructions for g in generated], 3),
                " / ".join(f"{value:.2f}" for value in PUBLISHED_FID[model]) if model in PUBLISHED_FID else "–",
            ]
        )
    floors = [g.floor for generated in found.generated.values() for g in generated][:1]
    lines.append(["training images", "–", spread(floors, 3), "–", "–", "–", "–"])
    return Sheet("Images", Table(columns, lines))


def claims(found: Found) -> list[Claim]:
    """What was aimed at, and what came out."""
    made = []
    for size, measured in timed(found).items():
        better = [overtaking(c, "adam", LONGEST) for c in measured]
        ratios = [b.ratio for b in better if b is not None]
        made += [
            Claim(
                f"{NAMES[size]}: to the same loss as Adam with {LONGEST} steps or a lower one, at least {aim:g} times "
                "less CPU time",
                f"{spread(ratios)} times ({', '.join(f'{ratio:.1f}' for ratio in ratios)}; "
                f"{len(ratios)} of {len(better)} seeds get there)",
                len(ratios) == len(better) and fmean(ratios) >= aim,
            )
            for aim in AIMS
        ]
        losses = {m: [at(c, m, LONGEST)[1] for c in measured] for m in (JOINT, *METHODS)}
        made.append(
            Claim(
                f"{NAMES[size]}: {LONGEST} joint steps end at a lower loss than {LONGEST} steps of any nested method",
                ", ".join(f"{LABELS[m]} {spread(values, 5)}" for m, values in losses.items()),
                all(j <= min(rest) for j, *rest in zip(*losses.values(), strict=True)),
            )
        )
    images = found.generated
    if images["jiio"] and images["vae"]:
        for what, aim in (("mixture", "new images"), ("reconstructions", "reconstructions")):
            values = {model: [getattr(g, what) for g in images[model]] for model in ("jiio", "vae")}
            if what == "mixture":  # the autoencoder in the better of its two ways
                prior = [g.prior for g in images["vae"] if g.prior is not None]
                values["vae"] = min(values["vae"], prior, key=fmean) if prior else values["vae"]
            made.append(
                Claim(
                    f"Fréchet distance of {aim} no larger than the autoencoder's",
                    f"{spread(values['jiio'], 3)} and {spread(values['vae'], 3)}",
                    fmean(values["jiio"]) <= fmean(values["vae"]),
                )
            )
    return made


def notes(config: JiioGenerationConfig, found: Found) -> list[str]:
    """What a reader must know."""
    accuracies = [g.accuracy for generated in found.generated.values() for g in generated]
    made = [
        "The Fréchet distance is that of FID's formula in the 32 features of a small classifier trained here on the "
        "same training images"
        + (f" ({100 * accuracies[0]:.1f} % right on the test images)" if accuracies else "")
        + ": it compares the models of this page with each other, and with no FID.",
        "Published: 7659 ms for Adam with 40 steps, 862 ms for 40 joint steps, 2156 ms for 100, a multiscale model on "
        "CelebA, with the nested optimizer in train mode; here all run in eval mode, "
        "the nested optimizer's equilibria start from the last ones, and their tolerance is tuned.",
        "Nested optimization with the one-step gradient is cheaper and not exact; gradient descent with a tuned step "
        "size is a stronger rival than Adam where the loss is nearly quadratic in the latent.",
    ]
    for size, measured in timed(found).items():
        tuned = "; ".join(
            f"α = {c.step_size:g}, damping {' '.join(f'{d:g}' for d in c.damping)}, "
            + ", ".join(f"{LABELS[m]} {c.rates[m]:g} at {c.tolerances[m]:g}" for m in METHODS)
            for c in measured
        )
        made.append(f"{NAMES[size]}, tuned on validation images, seed by seed (step size at tolerance): {tuned}.")
    if config.plan.scale == "paper":
        made.append("The published size (MDEQ on CelebA 64×64) is not among the recipes: these are the small settings.")
    if found.missing:
        made.append(f"Not there, or not come to an end: {', '.join(found.missing)}.")
    return made
