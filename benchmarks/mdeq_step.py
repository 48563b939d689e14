"""A training step of a multiscale equilibrium model: implicit and phantom gradients, ours beside TorchDEQ.

    python benchmarks/mdeq_step.py                    # small sizes, one CPU thread
    python benchmarks/mdeq_step.py --device cuda      # MDEQ-Tiny and MDEQ-Large, batches of 128

A step is stem, equilibrium, head, cross-entropy and the backward pass; the optimizer is left out. Both libraries solve
the same cell at the same weights (no weight normalization, no dropout), with the budgets of MDEQ-Tiny on CIFAR-10:
Broyden, at most 22 steps forward and 24 backward. Targets (Geng et al. 2021): a phantom step at least 1.4 times as fast
as an implicit one; ours no slower than TorchDEQ's step of the same kind.
"""

from __future__ import annotations

import os
import warnings

import record  # isort: skip  (first: it sets the number of threads)

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torchdeq
from record import Bars, Candidate, Row, Target, interleave
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import torchimplicit as ti
from torchimplicit.models import MDEQ, MDEQConfig, mdeq_large, mdeq_small, mdeq_tiny

FORWARD, BACKWARD, TOLERANCE = 22, 24, 1e-3
SETTLING_STEPS = 20
COLUMNS = (
    "model",
    "variant",
    "forward ms",
    "step ms",
    "evaluations",
    "products",
    "residual",
    "gradient cosine",
    "speed-up over implicit",
    "speed-up over TorchDEQ",
)
KINDS = {
    "implicit": ti.Implicit(linear_solver=ti.GMRES(rtol=TOLERANCE, max_steps=BACKWARD)),
    "phantom A(5, 0.5)": ti.UnrolledPhantom(steps=5, damping=0.5),
}


@dataclass(frozen=True)
class Case:
    """A model and its batch.

    Attributes:
        images: ``[batch, 3, 32, 32]``.
        labels: ``[batch]``.
    """

    name: str
    model: MDEQ
    images: Tensor
    labels: Tensor


def cases(device: str, quick: bool, seed: int) -> list[Case]:
    """The models of the device, their weights moved a little from where they begin."""
    sizes: list[tuple[str, MDEQConfig, int]] = [
        ("small, 32 images", mdeq_small(image_channels=3, downsamplings=2), 32),
        ("Tiny, 4 images", mdeq_tiny(), 4),
    ]
    if device == "cuda":
        sizes = [("Tiny, 128 images", mdeq_tiny(), 128), ("Large, 128 images", mdeq_large(), 128)]
    return [_case(name, replace(c, weight_norm=False), n, device, seed) for name, c, n in sizes[: 1 if quick else None]]


def _case(name: str, config: MDEQConfig, batch: int, device: str, seed: int) -> Case:
    torch.manual_seed(seed)
    solver = ti.Broyden(rtol=TOLERANCE, atol=0.0, max_steps=FORWARD)
    model = MDEQ(config, solver=solver, gradient=KINDS["phantom A(5, 0.5)"]).to(device)
    images = torch.randn(batch, 3, 32, 32, device=device)
    labels = torch.arange(batch, device=device) % config.classes
    case = Case(name, model, images, labels)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(SETTLING_STEPS):
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return case


def ours(case: Case, kind: str) -> Callable[[], Tensor]:
    """The loss, by the model as it is."""

    def loss() -> Tensor:
        case.model.equilibrium.gradient = KINDS[kind]
        return functional.cross_entropy(case.model(case.images), case.labels)

    return loss


def theirs(case: Case, kind: str) -> Callable[[], Tensor]:
    """The loss, with TorchDEQ in the place of our equilibrium layer."""
    implicit = kind == "implicit"
    deq = torchdeq.get_deq(
        f_solver="broyden",
        b_solver="broyden",
        ift=implicit,
        grad=1 if implicit else 5,
        tau=1.0 if implicit else 0.5,
        f_max_iter=FORWARD,
        b_max_iter=BACKWARD,
        f_tol=TOLERANCE,
        b_tol=TOLERANCE,
        f_stop_mode="rel",
        b_stop_mode="rel",
    )
    assert deq.f_max_iter == FORWARD  # it ignores names that it does not know
    assert deq.b_max_iter == BACKWARD
    model, cell = case.model, case.model.equilibrium.cell

    def loss() -> Tensor:
        x = model.stem(case.images)
        state = deq(lambda *z: cell(z, x), cell.initial_state(x))[0][-1]
        return functional.cross_entropy(model.head(state), case.labels)

    return loss


class _Norms(TorchDispatchMode):
    """Counts the rows that pass through group normalizations, which the cell alone has."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith("native_group_norm"):
            self.rows[name] += args[0].shape[0]
        return func(*args, **(kwargs or {}))


def work(case: Case, loss: Callable[[], Tensor]) -> tuple[float, float]:
    """Evaluations of the cell and products with its Jacobian of a step, in whole-batch equivalents."""
    norms = sum(isinstance(module, nn.GroupNorm) for module in case.model.equilibrium.cell.modules())
    whole = norms * len(case.labels)
    with _Norms() as forward:
        value = loss()
    with _Norms() as backward:
        value.backward()
    products = forward.rows["native_group_norm_backward"] + backward.rows["native_group_norm_backward"]
    return (forward.rows["native_group_norm"] + backward.rows["native_group_norm"]) / whole, products / whole


def gradients(case: Case, loss: Callable[[], Tensor]) -> Tensor:
    """In all parameters, as one vector."""
    found = torch.autograd.grad(loss(), tuple(case.model.parameters()))
    return torch.cat([g.flatten() for g in found]).double()


def converged(case: Case) -> Callable[[], Tensor]:
    """The loss with both solves taken much further: what gradients are compared with."""

    def loss() -> Tensor:
        layer = case.model.equilibrium
        usual = layer.solver
        layer.solver = ti.Broyden(rtol=1e-6, max_steps=200)
        layer.gradient = ti.Implicit(linear_solver=ti.GMRES(rtol=1e-6, max_steps=200))
        value = functional.cross_entropy(case.model(case.images), case.labels)
        layer.solver = usual
        return value

    return loss


def residual(case: Case, loss: Callable[[], Tensor]) -> float:
    """The mean relative residual of the state that reaches the head."""
    seen: list[Any] = []
    handles = [
        case.model.stem.register_forward_hook(lambda module, args, out: seen.append(out)),
        case.model.head.register_forward_pre_hook(lambda module, args: seen.append(args[0])),
    ]
    with torch.no_grad():
        loss()
        for handle in handles:
            handle.remove()
        x, state = seen[0], list(seen[1])
        image = case.model.equilibrium.cell(state, x)
        flat, mapped = (torch.cat([leaf.flatten(1) for leaf in tree], dim=1) for tree in (state, image))
        return float(((mapped - flat).norm(dim=1) / mapped.norm(dim=1)).mean())


def measure(case: Case, repeats: int, seconds: float, seed: int, device: str) -> list[Row]:
    """A row for each library and kind of gradient."""
    exact = gradients(case, converged(case))
    rows: list[Row] = []
    timed: dict[Any, Candidate] = {}
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for kind in KINDS:
        for library, make in (("ours", ours), ("TorchDEQ", theirs)):
            loss, name = make(case, kind), f"{library}, {kind}"
            row: Row = {"model": case.name, "variant": name, "kind": kind}
            rows.append(row)
            figures, error = record.attempt(lambda loss=loss: (work(case, loss), gradients(case, loss)))
            if figures is None:
                row["error"] = error
                continue
            (row["evaluations"], row["products"]), found = figures
            row["residual"] = residual(case, loss)
            row["gradient cosine"] = float(functional.cosine_similarity(found, exact, dim=0))

            def forward(_: Any, loss: Callable[[], Tensor] = loss) -> None:
                loss()
                wait()

            def step(_: Any, loss: Callable[[], Tensor] = loss) -> None:
                loss().backward()
                wait()

            timed[name, "forward ms"], timed[name, "step ms"] = Candidate(forward), Candidate(step)
    for (name, what), timing in interleave(timed, repeats, seconds, seed=seed).items():
        row = next(row for row in rows if row["variant"] == name)
        on_gpu = device == "cuda"
        row[what] = timing.wall_ms if on_gpu else timing.cpu_ms
        row[f"{what}, quartiles"] = timing.wall_quartiles_ms if on_gpu else timing.cpu_quartiles_ms
        row[f"{what}, wall"] = timing.wall_ms
    step_ms = {row["variant"]: row["step ms"] for row in rows if "step ms" in row}
    for row in rows:
        library = row["variant"].split(",")[0]
        for title, other in (
            ("speed-up over implicit", f"{library}, implicit"),
            ("speed-up over TorchDEQ", f"TorchDEQ, {row['kind']}"),
        ):
            if "step ms" in row and other in step_ms:
                row[title] = step_ms[other] / row["step ms"]
    return rows


def targets(rows: list[Row]) -> list[Target]:
    """What is wanted of ours."""
    made = []
    for row in rows:
        if not row["variant"].startswith("ours"):
            continue
        made.append(
            Target(
                f"{row['model']}, {row['kind']}: speed-up over TorchDEQ", row.get("speed-up over TorchDEQ"), ">=", 1.0
            )
        )
        if row["kind"] != "implicit":
            name = f"{row['model']}, {row['kind']}: speed-up over implicit"
            made.append(Target(name, row.get("speed-up over implicit"), ">=", 1.4))
    return made


def panels(rows: list[Row]) -> list[Bars]:
    """Milliseconds of a step, a panel for each model."""
    out = []
    for model in dict.fromkeys(row["model"] for row in rows):
        groups: dict[str, dict[str, float]] = {}
        for row in rows:
            if row["model"] == model and "step ms" in row:
                groups.setdefault(row["kind"], {})[row["variant"].split(",")[0]] = row["step ms"]
        out.append(Bars(model, "milliseconds a step", groups, line=None))
    return out


def main() -> None:
    """Measure, compare, record."""
    options = record.arguments(__doc__.splitlines()[0], repeats=9, seconds=60.0, device="cpu")
    warnings.simplefilter("ignore", ti.ConvergenceWarning)
    load, rows = os.getloadavg(), []
    for case in cases(options.device, options.quick, options.seed):
        rows += measure(case, options.repeats, options.seconds, options.seed, options.device)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "one CPU thread"
    record.record(
        "mdeq_step" if options.device == "cpu" else f"mdeq_step_{options.device}",
        options,
        load_before=load,
        settings={
            "device": name,
            "step": "stem, equilibrium, head, cross-entropy and backward; no weight normalization, no dropout",
            "weights": f"after {SETTLING_STEPS} steps of SGD on the batch, which is noise",
            "forward": f"Broyden, relative {TOLERANCE:g}, at most {FORWARD} steps, both libraries",
            "backward": f"ours GMRES, TorchDEQ Broyden; relative {TOLERANCE:g}, at most {BACKWARD} steps",
        },
        rows={"A training step": rows},
        columns={"A training step": COLUMNS},
        targets=targets(rows),
        panels=panels(rows),
        notes=[
            "Times are medians, of CPU time on a CPU and of wall time on a GPU; quartiles are in the JSON.",
            "evaluations and products count the cell and its vector-Jacobian products in whole-batch equivalents, by "
            "its normalizations; the last product, into the parameters, is among them.",
            "residual: mean relative residual of the state that reaches the head. gradient cosine: of the gradient in "
            "all parameters to that of both solves to 1e-6, or 200 steps.",
            "Ours is told that samples do not depend on each other (rowwise), so that converged ones leave the batch.",
        ],
    )


if __name__ == "__main__":
    main()
