"""The table's figures."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from torchimplicit.recipes.images.cost import Cost
from torchimplicit.recipes.phantom_ablation.rows import CONTROL, IMPLICIT, NPG, SWEEP, UPG, Row
from torchimplicit.recipes.plotting import COLOURS, axes, style
from torchimplicit.recipes.runtime.table import Drawing
from torchimplicit.recipes.training.results import Results

SHOWN = (IMPLICIT, "implicit-nopre", "implicit-sgd", CONTROL, UPG, NPG)
"""The rows whose training is drawn; all nine would hide each other."""


def drawings(rows: dict[str, dict[int, Results]], labels: dict[str, Row], cost: dict[str, Cost]) -> list[Drawing]:
    """Those for which there are runs."""
    made = []
    if any(rows[name] for name in SHOWN):
        made.append(_training(rows, labels))
    if any(rows[name] for name in SWEEP):
        made.append(_sweep(rows, labels))
    if cost:
        made.append(_cost(cost))
    return made


def _training(rows: dict[str, dict[int, Results]], labels: dict[str, Row]) -> Drawing:
    figure, (by_step, by_cost) = axes(2, width=4.8)
    for index, name in enumerate(SHOWN):
        runs = [one for one in rows[name].values() if one.validations]
        if not runs:
            continue
        length = min(len(one.validations) for one in runs)
        steps = [runs[0].validations[i].step for i in range(length)]
        accuracy = [100 * fmean(one.validations[i].figures["accuracy"] for one in runs) for i in range(length)]
        work = [fmean(_work(one, step) for one in runs) for step in steps]
        by_step.plot(steps, accuracy, label=labels[name].label, **style(index))
        by_cost.plot(work, accuracy, **style(index))
    by_step.set(xlabel="optimizer steps", ylabel="validation accuracy, %")
    by_cost.set(xlabel="evaluations of the cell and products with its Jacobian")
    figure.legend(loc="outside lower center", ncols=3)
    return Drawing(
        "training",
        figure,
        "Validation accuracy along training, mean over the seeds: by optimizer steps, and by the work in the "
        "equilibrium (forward evaluations plus backward products, whole-batch equivalents; in pretraining one of each "
        "for every application).",
    )


def _work(one: Results, step: int) -> float:
    """Evaluations and products until a step."""
    assert one.costs is not None
    settings = one.settings["equilibria"]
    pretraining = min(step, settings["pretrain_steps"])
    return 2 * pretraining * settings["pretrain_depth"] + (step - pretraining) * (
        one.costs.forward + one.costs.backward
    )


def _sweep(rows: dict[str, dict[int, Results]], labels: dict[str, Row]) -> Drawing:
    figure, (over_steps, over_damping) = axes(2, width=4.8)
    for panel, other, along, words in (
        (over_steps, "damping", "steps", "steps k, at λ = 0.5"),
        (over_damping, "steps", "damping", "damping λ, at k = 5"),
    ):
        fixed = getattr(labels[UPG], other)
        names = [name for name in (UPG, *SWEEP) if getattr(labels[name], other) == fixed]
        points = sorted((getattr(labels[name], along), _accuracies(rows[name])) for name in names)
        points = [(x, values) for x, values in points if values]
        panel.plot([x for x, _ in points], [fmean(values) for _, values in points], **style(0))
        for x, values in points:
            panel.plot([x] * len(values), values, ".", color=COLOURS[6])
        panel.set(xlabel=words, ylabel="test accuracy, %")
    return Drawing(
        "sweep",
        figure,
        "Test accuracy of UPG(k, λ): means over the seeds (line), and every run (dots). Points other than A(5, 0.5) "
        "have fewer seeds.",
    )


def _accuracies(by_seed: dict[int, Results]) -> Sequence[float]:
    return [100 * one.test.figures["accuracy"] for one in by_seed.values() if one.test is not None]


def _cost(cost: dict[str, Cost]) -> Drawing:
    figure, (seconds, products) = axes(2, width=4.8, height=2.9)
    names = list(cost)[::-1]
    seconds.barh(names, [1e3 * cost[name].forward_seconds for name in names], color=COLOURS[0], label="forward")
    seconds.barh(
        names,
        [1e3 * cost[name].backward_seconds for name in names],
        left=[1e3 * cost[name].forward_seconds for name in names],
        color=COLOURS[1],
        label="backward",
    )
    seconds.set(xlabel="milliseconds a step")
    seconds.legend()
    products.barh(names, [cost[name].backward for name in names], color=COLOURS[1])
    products.set(xlabel="products with the Jacobian, backward")
    products.set_yticklabels([])
    for panel in (seconds, products):
        panel.set_axisbelow(True)
        panel.grid(visible=False, axis="y")
    return Drawing(
        "cost",
        figure,
        "A training step at the same trained weights on the same batches, by gradient: time of the forward and the "
        "backward pass (medians), and products with the cell's Jacobian in the backward pass.",
    )
