"""What the published trainings cost: evaluations, steps and whole trainings in floating-point operations.

    python benchmarks/full_size.py

Models have their published sizes and random weights. PyTorch's counter sees products of matrices and convolutions, two
operations a multiply-add. A step's count is linear in its budgets: it is counted at the smallest ones for one sample,
and continued to the published ones. A whole step of MDEQ-Tiny is counted beside that, and timed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import record  # isort: skip  (first: it sets the number of threads)

import torch
from record import Row, Target
from reversible import Living
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from torchimplicit.models import MDEQ, DEQTransformer
from torchimplicit.nn import Equilibrium
from torchimplicit.recipes.phantom import graphs, images, language
from torchimplicit.recipes.runtime.run import quietly
from torchimplicit.recipes.runtime.settings import Equilibria, Optimization
from torchimplicit.recipes.runtime.task import gradient, solver

torch.set_num_threads(1)

SUSTAINED = 20e12
"""Operations a second that a GPU is assumed to sustain in the column of GPU hours. It was not measured."""

VOCABULARY = 267_735
"""Words of WikiText-103."""

NODES, EDGES, LABELS = 2245, 61_318, 121
"""PPI's graphs: mean numbers of nodes and of edges, counted in both directions; labels of a node."""

TIMED_BATCH, TIMED_STEPS = 16, 3


@dataclass(frozen=True)
class Training:
    """A published training.

    Attributes:
        name: of the recipe, and what differs from it.
        settings: by gradient; published figures stand beside.
        loss: of a number of samples.
    """

    name: str
    optimization: Optimization
    settings: dict[str, tuple[Equilibria, str]]
    model: nn.Module
    loss: Callable[[int], Tensor]


def operations(call: Callable[[], Tensor]) -> float:
    """Operations of a loss and its gradient."""
    with FlopCounterMode(display=False) as counter, quietly():
        call().backward()
    return float(counter.get_total_flops())


def step(training: Training, settings: Equilibria, samples: int = 1) -> Callable[[], Tensor]:
    """A training step with solvers that use their budgets up, but for the way back."""
    (layer,) = (module for module in training.model.modules() if isinstance(module, Equilibrium))
    settings = images.run_out(settings)
    layer.solver, layer.gradient = solver(settings), gradient(settings)
    return lambda: training.loss(samples)


def counted(training: Training, settings: Equilibria) -> tuple[float, float, float]:
    """Operations of one sample: an evaluation of the map, a step, and a step of pretraining."""

    def at(solver_steps: int, backward: int) -> float:
        few = replace(settings, solver_steps=solver_steps, backward_steps=backward, phantom_steps=backward)
        return operations(step(training, few))

    least = at(2, 2)
    evaluation, back = at(3, 2) - least, at(2, 3) - least
    most = settings.backward_steps if settings.gradient == "implicit" else settings.phantom_steps
    whole = least + (settings.solver_steps - 2) * evaluation + (most - 2) * back
    # of pretraining, the evaluations are differentiated: each with two products, in the state and in the parameters
    outside = least - 2 * evaluation - 2 * back
    return evaluation, whole, outside + settings.pretrain_depth * 3 * evaluation


def trainings(quick: bool) -> list[Training]:
    """Those whose budgets are used up."""
    chosen = [
        ("images-cifar10", images.cifar10(), 32, "85.0 ± 0.2 %", "85.8 ± 0.5 %"),
        ("images-cifar10-large", images.cifar10_large(), 32, "93.8 ± 0.17 %", "95.0 ± 0.16 %"),
        ("images-imagenet", images.imagenet(), 224, "75.3 %", "75.7 %"),
    ]
    found = [_images(*one) for one in chosen[: 1 if quick else None]]
    return found if quick else [*found, _language("post", "24.0", "25.7"), _language("pre", "24.5", "24.4")]


def _images(name: str, config: images.ImageConfig, side: int, implicit: str, phantom: str) -> Training:
    model = MDEQ(replace(images.sizes(config), weight_norm=False))  # it has no products

    def loss(samples: int) -> Tensor:
        return functional.cross_entropy(
            model(torch.randn(samples, 3, side, side)), torch.zeros(samples, dtype=torch.long)
        )

    exact = replace(config.equilibria, gradient="implicit")
    if config.model == "tiny":
        exact = replace(exact, pretrain_steps=3000)
    return Training(
        name, config.optimization, {"implicit": (exact, implicit), "UPG": (config.equilibria, phantom)}, model, loss
    )


def _language(normalization: str, implicit: str, phantom: str) -> Training:
    config = language.wikitext103(normalization)
    model = DEQTransformer(replace(config.model(VOCABULARY), weight_norm=False))
    words = torch.randint(VOCABULARY, (1, config.segment_length + 1))

    def loss(samples: int) -> Tensor:
        return model(words[:, :-1].expand(samples, -1), words[:, 1:].expand(samples, -1))[0].mean()

    upg = replace(config.equilibria, gradient="unrolled-phantom")
    settings = {"implicit": (config.equilibria, f"perplexity {implicit}"), "UPG": (upg, f"perplexity {phantom}")}
    return Training(f"language-wikitext103, {normalization}LN", config.optimization, settings, model, loss)


def rows_of(training: Training) -> list[Row]:
    """A row for each gradient."""
    found = []
    batch, steps = training.optimization.batch_size, training.optimization.steps
    for name, (settings, published) in training.settings.items():
        evaluation, one, pretraining = counted(training, settings)
        first = settings.pretrain_steps
        total = batch * ((steps - first) * one + first * pretraining)
        back = settings.backward_steps if name == "implicit" else settings.phantom_steps
        found.append({
            "training": training.name,
            "gradient": name,
            "batch": batch,
            "steps": steps,
            "budgets": f"{settings.solver_steps} / {back}",
            "GFLOP an evaluation, a sample": evaluation / 1e9,
            "TFLOP a step": batch * one / 1e12,
            "EFLOP in all": total / 1e18,
            "GPU hours at 20 TFLOP/s (assumed)": total / SUSTAINED / 3600,
            "published": published,
        })  # fmt: skip
    return found


def ppi() -> Row:
    """PPI's evaluation, by hand: a product with the weights and one with the adjacency (and self-loops) a layer."""
    config = graphs.ppi()
    widths = (*config.widths, LABELS)
    evaluation = sum(2 * NODES * width**2 + 2 * (EDGES + NODES) * width for width in widths)
    return {
        "training": "graphs-ppi",
        "gradient": "both",
        "batch": config.optimization.batch_size,
        "steps": config.optimization.steps,
        "budgets": "to a tolerance",
        "GFLOP an evaluation, a sample": evaluation / 1e9,
        "published": "F1 97.6 % implicit, 98.2 % UPG(0.5)",
    }


def timed(training: Training) -> tuple[list[Row], float]:
    """Steps of a small batch on this CPU, their memory, and the largest deviation of a whole step's count."""
    rows, worst = [], 0.0
    scale = training.optimization.batch_size / TIMED_BATCH
    for name, (settings, _) in training.settings.items():
        _, predicted, _ = counted(training, settings)
        worst = max(worst, abs(operations(step(training, settings)) / predicted - 1))
        call, seconds = step(training, settings, TIMED_BATCH), []
        with quietly():
            for _ in range(TIMED_STEPS):
                began = time.process_time()
                call().backward()
                seconds.append(time.process_time() - began)
            with Living() as living:
                step(training, settings, 1)().backward()
        one = median(seconds)
        rows.append({
            "gradient": name,
            f"s a step of {TIMED_BATCH}": one,
            "GFLOP/s": TIMED_BATCH * predicted / one / 1e9,
            "s a step of 128, scaled": scale * one,
            "days in all, scaled": scale * one * training.optimization.steps / 86400,
            "MiB a sample": living.peak / 2**20,
        })  # fmt: skip
    return rows, worst


def main() -> None:
    """Count, time, record."""
    options = record.arguments(__doc__.splitlines()[0])
    load = os.getloadavg()
    torch.manual_seed(options.seed)
    chosen = trainings(options.quick)
    counts = [row for training in chosen for row in rows_of(training)]
    measured, worst = timed(chosen[0])
    titles = {"Counts": [*counts, ppi()], "MDEQ-Tiny on this CPU": measured}
    record.record(
        "full_size",
        options,
        settings={
            "budgets": "largest number of solver steps forward / GMRES steps or k backward, all used up",
            "samples": f"an image, a segment of 150 words, or a graph of {NODES} nodes and {EDGES} edges",
        },
        rows=titles,
        columns={title: list(rows[0]) for title, rows in titles.items()},
        targets=[Target("a whole step of MDEQ-Tiny beside its count, relative deviation", worst, "<=", 0.02)],
        notes=[
            "Counted: products of matrices and convolutions. Not counted: elementwise operations, normalizations, "
            "optimizer, validation, and the rest of what limits a GPU.",
            f"GPU hours are operations / ({SUSTAINED:.0e} per second × 3600), for all GPUs together. The rate is an "
            "assumption: no GPU was at hand.",
            "PPI's solver stops at its tolerance, so that its steps have no fixed count.",
            "Published figures are those of Geng et al. (2021); implicit and UPG with different optimizers in part.",
            "The Jacobian regularization of preLN (with probability 0.4 a step) is not counted.",
            f"Seconds of CPU time, one thread, random weights, {TIMED_BATCH} samples, medians of {TIMED_STEPS}; those "
            "of 128 samples and of a training are scaled from them.",
            "MiB: the most that the results of operations hold at once, for one sample, without parameters.",
        ],
        load_before=load,
    )


if __name__ == "__main__":
    main()
