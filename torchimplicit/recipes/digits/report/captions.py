"""How to read each picture, and the figures that it shows in this run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torchimplicit.recipes.digits.results import EstimatorResult, Results


@dataclass(frozen=True)
class Caption:
    """What stands with a picture.

    Attributes:
        title: what it shows.
        reading: how a newcomer reads it.
        numbers: its figures in this run, in a sentence.
    """

    title: str
    reading: str
    numbers: Callable[[Results], str]


def _each(results: Results, figure: Callable[[EstimatorResult], str | None]) -> str:
    found = {result.label: figure(result) for result in results.estimators.values()}
    return "; ".join(f"{name} {text}" for name, text in found.items() if text is not None)


def _loss(results: Results) -> str:
    return "In this run, loss over the last epoch and time spent: " + _each(
        results, lambda r: f"{r.summary.training_loss:.3f} after {r.summary.training_seconds:.1f} s"
    )


def _residual(results: Results) -> str:
    def reached(result: EstimatorResult) -> str:
        texts = []
        for profile in result.profiles:
            hits = [i for i, value in enumerate(profile.median) if value <= results.config.tolerance]
            texts.append(f"{hits[0] if hits else f'more than {len(profile.median) - 1}'} ({profile.solver})")
        return " and ".join(texts)

    return "In this run, iterations until the median sample is within the tolerance: " + _each(results, reached)


def _cosine(results: Results) -> str:
    return "In this run, median and least cosine: " + _each(
        results,
        lambda r: None if math.isnan(r.summary.cosine) else f"{r.summary.cosine:.4f} and {r.summary.cosine_least:.4f}",
    )


def _radius(results: Results) -> str:
    def ends(result: EstimatorResult) -> str | None:
        audits = result.track.audits
        return f"{audits[0].spectral_radius:.2f} to {audits[-1].spectral_radius:.2f}" if audits else None

    return "In this run, from the first audit to the last: " + _each(results, ends)


def _accuracy(results: Results) -> str:
    return "In this run, at the end: " + _each(results, lambda r: f"{100 * r.summary.validation_accuracy:.1f} %")


CAPTIONS = {
    "loss-against-time": Caption(
        "Training loss against time",
        "Lower is better, and further left is faster. The faint line is the loss of every single batch, the strong "
        "line its running mean. All the classifiers take the same number of steps, so a curve that ends earlier had "
        "the cheaper steps. Where two curves lie on each other, the estimate taught the classifier as much per second "
        "as the exact gradient did.",
        _loss,
    ),
    "residual-against-iteration": Caption(
        "Solver residual against iteration",
        "How far the state still is from being unchanged by the cell, on validation images, after training. Every "
        "line should fall straight, for the scale is logarithmic; the steeper, the fewer evaluations. The solid line "
        "is Anderson acceleration, with the band between the 10 % and the 90 % quantile of the images; the dotted one "
        "simply applies the cell again and again. Between them lies what the solver gains. A line that levels off far "
        "above the tolerance would mean that there is no equilibrium to be found. (Training stops each image at the "
        "dashed tolerance; here the solve goes on to 1e-6.)",
        _residual,
    ),
    "cosine-against-step": Caption(
        "Cosine to the exact gradient against training step",
        "Now and then training pauses its stopwatch, and the exact gradient is computed on the same batch at the same "
        "weights, to a far tighter tolerance. A cosine of 1 means that the estimate points the same way, 0 "
        "that it is at right angles to it and of no use. A phantom gradient keeps only the first terms of a series, "
        "so its cosine drops when the spectral radius of J (next picture) comes near 1 and the left-out terms matter. "
        "It can be well below 1 and still train well, as long as it points downhill.",
        _cosine,
    ),
    "spectral-radius-against-step": Caption(
        "Spectral radius against training step",
        "J is the Jacobian of the cell at the equilibrium; its spectral radius is the factor by which a disturbance "
        "shrinks with every application of the cell. Near 0 the model is almost an ordinary shallow network; towards "
        "1 it remembers for long, and both solves take longer. Training chooses this number by itself.",
        _radius,
    ),
    "accuracy-against-step": Caption(
        "Validation accuracy against training step",
        "The share of images classified right among those that the classifier is never trained on, after every epoch. "
        "It should rise and level off; falling while the training loss still falls would be overfitting.",
        _accuracy,
    ),
}
