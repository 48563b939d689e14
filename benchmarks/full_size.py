"""What the published trainings cost: evaluations, steps and whole trainings in floating-point operations.

    python benchmarks/full_size.py

Models have their published sizes and random weights. PyTorch's counter sees products of matrices and convolutions, two
operations a multiply-add. A step is made up of as many evaluations of the map and products with its Jacobian as the
published budgets allow, and of what surrounds the equilibrium. Steps of MDEQ-Tiny are also run and timed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import record  # isort: skip  (first: it sets the number of threads)

import torch
from record import Row, Target
from reversible import Living
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from torchimplicit.gradients import OneStep
from torchimplicit.models import MDEQ, DEQTransformer
from torchimplicit.nn import Equilibrium
from torchimplicit.recipes.phantom import graphs, images, language
from torchimplicit.recipes.runtime.run import quietly
from torchimplicit.recipes.runtime.settings import Equilibria, Optimization
from torchimplicit.recipes.runtime.task import gradient, solver
from torchimplicit.solvers import FixedPointIteration

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


@dataclass(frozen=True)
class Counts:
    """Operations for one sample: of an evaluation of the map; of a product with its Jacobian's transpose in the state;
    of one in the parameters and the input too; of everything outside of the equilibrium, forward and backward."""

    evaluation: float
    product: float
    parameters: float
    outside: float

    def step(self, settings: Equilibria) -> float:
        """Of a step that uses its whole budgets."""
        solve = self.outside + settings.solver_steps * self.evaluation
        if settings.gradient == "implicit":
            return solve + self.evaluation + settings.backward_steps * self.product + self.parameters
        return solve + settings.phantom_steps * (self.evaluation + self.parameters)

    def pretraining(self, settings: Equilibria) -> float:
        """Of a step whose solver is replaced by a few evaluations that are differentiated."""
        return self.outside + settings.pretrain_depth * (self.evaluation + self.parameters)


def operations(call: Callable[[], Any]) -> float:
    """Operations of a call, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter, quietly():
        call()
    return float(counter.get_total_flops())


def layer_of(training: Training) -> Equilibrium:
    """Its equilibrium."""
    (layer,) = (module for module in training.model.modules() if isinstance(module, Equilibrium))
    return layer


def counted(training: Training) -> Counts:
    """Count the parts of a step on one sample.

    The counter does not see what runs in inference mode, as solves do: the map is evaluated once more by itself.
    """
    layer = layer_of(training)
    layer.solver, layer.gradient = FixedPointIteration(max_steps=1), OneStep()
    training.model.eval()  # dropout has no products, and its masks are drawn for a solve
    seen: list[tuple[Any, ...]] = []

    def note(cell: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not torch.is_inference_mode_enabled():
            seen.append(inputs)

    handle = layer.cell.register_forward_pre_hook(note)
    whole = operations(lambda: training.loss(1).backward())
    handle.remove()
    given, tree = pytree.tree_flatten(seen[-1])
    leaves = [leaf.detach().requires_grad_() if torch.is_tensor(leaf) else leaf for leaf in given]
    inputs = pytree.tree_unflatten(leaves, tree)
    with torch.no_grad():
        evaluation = operations(lambda: layer.cell(*inputs))
    image = pytree.tree_leaves(layer.cell(*inputs))
    ones = [torch.ones_like(leaf) for leaf in image]
    state = pytree.tree_leaves(inputs[0])
    product = operations(lambda: torch.autograd.grad(image, state, ones, retain_graph=True))
    everything = [leaf for leaf in leaves if torch.is_tensor(leaf)] + list(layer.cell.parameters())
    parameters = operations(lambda: torch.autograd.grad(image, everything, ones, allow_unused=True))
    return Counts(evaluation, product, parameters, whole - len(seen) * evaluation - parameters)


def step(training: Training, settings: Equilibria, samples: int) -> Callable[[], None]:
    """A training step with solvers that use their budgets up."""
    layer, settings = layer_of(training), images.run_out(settings)
    layer.solver, layer.gradient = solver(settings), gradient(settings)
    training.model.train()

    def run() -> None:
        with quietly():
            training.loss(samples).backward()

    return run


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


def rows_of(training: Training, counts: Counts) -> list[Row]:
    """A row for each gradient."""
    found = []
    batch, steps = training.optimization.batch_size, training.optimization.steps
    for name, (settings, published) in training.settings.items():
        one, first = counts.step(settings), settings.pretrain_steps
        total = batch * ((steps - first) * one + first * counts.pretraining(settings))
        back = settings.backward_steps if name == "implicit" else settings.phantom_steps
        found.append({
            "training": training.name,
            "gradient": name,
            "batch": batch,
            "steps": steps,
            "budgets": f"{settings.solver_steps} / {back}",
            "GFLOP an evaluation, a sample": counts.evaluation / 1e9,
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


def timed(training: Training, counts: Counts) -> list[Row]:
    """Steps of a small batch on this CPU, and their memory and evaluations."""
    rows: list[Row] = []
    scale = training.optimization.batch_size / TIMED_BATCH
    cell = layer_of(training).cell
    for name, (settings, _) in training.settings.items():
        call, seconds, calls = step(training, settings, TIMED_BATCH), [], [0]
        for _ in range(1 + TIMED_STEPS):
            began = time.process_time()
            call()
            seconds.append(time.process_time() - began)
        one = median(seconds[1:])
        handle = cell.register_forward_pre_hook(lambda *_, calls=calls: calls.__setitem__(0, calls[0] + 1))
        with Living() as living:
            step(training, settings, 1)()
        handle.remove()
        differentiated = 1 if name == "implicit" else settings.phantom_steps
        rows.append({
            "gradient": name,
            "evaluations": calls[0],
            "evaluations counted": settings.solver_steps + differentiated,
            f"s a step of {TIMED_BATCH}": one,
            "GFLOP/s": TIMED_BATCH * counts.step(settings) / one / 1e9,
            "s a step of 128, scaled": scale * one,
            "days in all, scaled": scale * one * training.optimization.steps / 86400,
            "MiB a sample": living.peak / 2**20,
        })  # fmt: skip
    return rows


def main() -> None:
    """Count, time, record."""
    options = record.arguments(__doc__.splitlines()[0])
    load = os.getloadavg()
    torch.manual_seed(options.seed)
    chosen = trainings(options.quick)
    counts = [counted(training) for training in chosen]
    rows = [row for training, one in zip(chosen, counts, strict=True) for row in rows_of(training, one)]
    measured = timed(chosen[0], counts[0])
    worst = max(abs(row["evaluations"] / row["evaluations counted"] - 1) for row in measured)
    titles = {"Counts": [*rows, ppi()], "MDEQ-Tiny on this CPU": measured}
    record.record(
        "full_size",
        options,
        settings={
            "budgets": "largest number of solver steps forward / GMRES steps or k backward, all used up",
            "samples": f"an image, a segment of 150 words, or a graph of {NODES} nodes and {EDGES} edges",
        },
        rows=titles,
        columns={title: list(part[0]) for title, part in titles.items()},
        targets=[
            Target("evaluations in a step of MDEQ-Tiny beside those counted, relative deviation", worst, "<=", 0.1)
        ],
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
            "Evaluations of the map beside those counted: the solver's last check of its result is not counted.",
            "MiB: the most that the results of operations hold at once, for one sample, without parameters.",
        ],
        load_before=load,
    )


if __name__ == "__main__":
    main()
