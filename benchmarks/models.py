"""Training steps of models that people train, eager and compiled, and how the cost of a layer grows.

    python benchmarks/models.py                     # all of it, on one CPU thread
    python benchmarks/models.py --peers PYTHON      # with jitted jaxopt of that interpreter beside the layers
    python benchmarks/models.py --device cuda --budget 420

A step is the loss and its backward pass; the optimizer is left out. TorchDEQ stands beside where it can express the
model: the same cell, at the same weights, with the same tolerances. Candidates are called in turn; times are medians,
of CPU time on a CPU and of wall time on a GPU. What the budget of seconds does not reach is left out, and named.
"""

from __future__ import annotations

import record  # isort: skip  (first: it sets the number of threads)

import gc
import json
import os
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from record import Bars, Row, Target
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.profiler import ProfilerActivity, profile

import torchimplicit as ti
from torchimplicit.errors import CaptureWarning
from torchimplicit.models import MDEQ, DEQTransformer, deq_transformer_small, mdeq_small, mdeq_tiny
from torchimplicit.models.ignn import IGNN, Adjacency, ignn_tu
from torchimplicit.models.physics_informed import EquilibriumField

TOLERANCE = 1e-3
FORWARD, BACKWARD = 22, 24
JITTED = {128: 0.8, 512: 1.0, 2048: 1.0}
"""By width, how much of jitted jaxopt's speed a compiled layer should have."""
Step = Callable[[], Any]
COLUMNS = (
    "model",
    "eager ms",
    "captured ms",
    "peer ms",
    "eager / captured",
    "TorchDEQ / captured",
    "compiling s",
    "eager MiB",
    "captured MiB",
    "peer MiB",
)


@dataclass(frozen=True)
class Case:
    """A model: what makes its steps, ``None`` where a library cannot express it."""

    name: str
    eager: Callable[[str], Step]
    captured: Callable[[str], Step] | None = None
    peer: Callable[[str], Step] | None = None


def equilibria(model: nn.Module) -> list[ti.nn.Equilibrium]:
    """The layers of a model that solve."""
    return [module for module in model.modules() if isinstance(module, ti.nn.Equilibrium)]


def compiling(model: nn.Module) -> nn.Module:
    """The model, with its equilibria compiled."""
    for layer in equilibria(model):
        layer.compiles = True
    return model


def by_torchdeq(model: nn.Module, solver: str, **options: Any) -> nn.Module:
    """The model, with TorchDEQ in the place of its equilibrium layers."""
    import torchdeq

    usual = {"f_tol": TOLERANCE, "b_tol": TOLERANCE, "f_stop_mode": "rel", "b_stop_mode": "rel"}
    usual |= {"f_max_iter": FORWARD, "b_max_iter": BACKWARD, "f_solver": solver, "b_solver": solver, "ift": True}
    deq = torchdeq.get_deq(**(usual | options))
    for layer in equilibria(model):

        def forward(*inputs: Any, layer: Any = layer) -> Any:
            z0 = layer._initial(inputs)
            several = isinstance(z0, list | tuple)
            with parametrize.cached():
                if several:
                    return deq(lambda *z: layer.cell(list(z), *inputs), z0)[0][-1]
                return deq(lambda z: layer.cell(z, *inputs), z0)[0][-1]

        layer.forward = forward
    return model


def mdeq(name: str, config: Any, images: int, phantom: bool) -> Case:
    """A multiscale model on pictures of noise."""

    def made(device: str) -> tuple[MDEQ, Tensor, Tensor]:
        torch.manual_seed(0)
        gradient: Any = ti.UnrolledPhantom(steps=5, damping=0.5)
        if not phantom:
            gradient = ti.Implicit(linear_solver=ti.GMRES(rtol=TOLERANCE, max_steps=BACKWARD))
        solver = ti.Broyden(rtol=TOLERANCE, max_steps=FORWARD)
        model = MDEQ(replace(config, weight_norm=False), solver=solver, gradient=gradient).to(device)
        x = torch.randn(images, 3, 32, 32, device=device)
        return model, x, torch.arange(images, device=device) % config.classes

    def step(model: nn.Module, x: Tensor, labels: Tensor) -> Step:
        return lambda: functional.cross_entropy(model(x), labels).backward()

    def peer(device: str) -> Step:
        model, *rest = made(device)
        options = {"ift": False, "grad": 5, "tau": 0.5} if phantom else {}
        return step(by_torchdeq(model, "broyden", **options), *rest)

    def ours(device: str, compile: bool) -> Step:
        model, *rest = made(device)
        return step(compiling(model) if compile else model, *rest)

    kind = "phantom" if phantom else "implicit"
    return Case(f"{name}, {images} images, {kind}", lambda d: ours(d, False), lambda d: ours(d, True), peer)


def transformer(batch: int = 8, length: int = 32) -> Case:
    """The small DEQ transformer on tokens at random."""

    def made(device: str) -> tuple[DEQTransformer, Tensor, Tensor]:
        torch.manual_seed(0)
        gradient = ti.Implicit(linear_solver=ti.GMRES(rtol=TOLERANCE, max_steps=BACKWARD))
        model = DEQTransformer(
            deq_transformer_small(vocabulary=1000), solver=ti.Anderson(memory=5, rtol=TOLERANCE), gradient=gradient
        ).to(device)
        model.eval()
        tokens, targets = torch.randint(1000, (2, batch, length), device=device)
        return model, tokens, targets

    def step(model: nn.Module, tokens: Tensor, targets: Tensor) -> Step:
        return lambda: model(tokens, targets)[0].mean().backward()

    def ours(device: str, compile: bool) -> Step:
        model, *rest = made(device)
        return step(compiling(model) if compile else model, *rest)

    def peer(device: str) -> Step:
        model, *rest = made(device)
        return step(by_torchdeq(model, "anderson"), *rest)

    name = f"DEQ transformer small, {batch} x {length} tokens"
    return Case(name, lambda d: ours(d, False), lambda d: ours(d, True), peer)


def graphs(count: int = 32, nodes: int = 41, features: int = 35) -> Case:
    """An IGNN on graphs of the size of COX2's: trees with a few more edges."""

    def made(device: str) -> tuple[IGNN, tuple[Any, ...], Tensor]:
        torch.manual_seed(0)
        solver = ti.FixedPointIteration(rtol=TOLERANCE, max_steps=300)
        gradient = ti.Implicit(linear_solver=ti.Neumann(rtol=TOLERANCE, max_steps=300))
        model = IGNN(ignn_tu(features), solver=solver, gradient=gradient).to(device)
        model.eval()
        parents = torch.cat([torch.randint(max(1, i), (count,))[:, None] for i in range(1, nodes)], dim=1)
        children = torch.arange(1, nodes).expand(count, -1)
        one = torch.stack((parents, children)) + nodes * torch.arange(count)[:, None]
        edges = one.reshape(2, -1)
        edges = torch.cat((edges, edges.flip(0)), dim=1).to(device)
        x = torch.randn(count * nodes, features, device=device)
        batch = torch.arange(count, device=device).repeat_interleave(nodes)
        adjacency = Adjacency.normalized(edges, count * nodes, None, dtype=x.dtype)
        return model, (x, adjacency, None, batch, count), torch.arange(count, device=device) % 2

    def step(model: nn.Module, given: tuple[Any, ...], labels: Tensor) -> Step:
        return lambda: functional.cross_entropy(model(*given), labels).backward()

    def peer(device: str) -> Step:
        model, *rest = made(device)
        return step(by_torchdeq(model, "fixed_point_iter", f_max_iter=300, b_max_iter=300), *rest)

    def ours(device: str, compile: bool) -> Step:
        model, *rest = made(device)
        return step(compiling(model) if compile else model, *rest)

    name = f"IGNN, {count} graphs of {nodes} nodes"
    return Case(name, lambda d: ours(d, False), lambda d: ours(d, True), peer)


def van_der_pol(points: int = 128, states: int = 40) -> Case:
    """The residual of Van der Pol's equation of a physics-informed equilibrium."""

    def eager(device: str) -> Step:
        torch.manual_seed(0)
        field = EquilibriumField((0.0,), (2.0,), outputs=1, states=states).double().to(device)
        x = torch.linspace(0, 2, points, dtype=torch.float64, device=device)[:, None]

        def step() -> None:
            found = field.derivatives(x, ((0,), (0, 0)))
            u, slope, bent = found[()], found[0,], found[0, 0]
            (bent - (1 - u * u) * slope + u).square().mean().backward()

        return step

    return Case(f"Van der Pol, {points} points, {states} states", eager)


def joint(batch: int = 32, latent: int = 40, states: int = 128) -> Case:
    """Joint inference of 40 latents for pictures of 8 x 8 points, the decoder trained through the envelope theorem."""

    def made(device: str, compile: bool) -> Step:
        torch.manual_seed(0)
        inner = nn.Parameter(0.5 * torch.linalg.qr(torch.randn(states, states)).Q.to(device))
        given = nn.Parameter(torch.randn(states, latent).to(device) / latent**0.5)
        head = nn.Parameter(torch.randn(64, states).to(device) / states**0.5)
        wanted = torch.rand(batch, 64, device=device)

        def f(z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(functional.linear(z, inner) + functional.linear(x, given))

        def loss(z: Tensor, x: Tensor) -> Tensor:
            return (functional.linear(z, head) - wanted).square().sum(dim=1) + 0.01 * x.square().sum(dim=1)

        problem = ti.JointInference(f, loss, step_size=0.02)
        start = torch.zeros(batch, states, device=device), torch.zeros(batch, latent, device=device)
        solver = ti.Anderson(rtol=TOLERANCE, max_steps=100)

        def step() -> None:
            found = ti.solve(problem, start, solver=solver, gradient=ti.Envelope(tolerance=10.0), compile=compile)
            loss(found.value.z, found.value.x).mean().backward()

        return step

    name = f"JIIO-{latent}, {batch} pictures"
    return Case(name, lambda d: made(d, False), lambda d: made(d, True))


def bratu(points: int = 100) -> Case:
    """A boundary value problem of Bratu, by Newton's method in double precision, with the gradient in its parameter."""

    def made(device: str, compile: bool) -> Step:
        slope = torch.ones(points - 1, dtype=torch.float64)
        second = torch.diag(slope, 1) + torch.diag(slope, -1) - 2 * torch.eye(points, dtype=torch.float64)
        second = ((points + 1) ** 2 * second).to(device)
        rate = torch.tensor(2.0, dtype=torch.float64, device=device, requires_grad=True)
        problem = ti.Root(lambda z, rate: second @ z + rate * z.exp(), batched=False)
        start = torch.zeros(points, dtype=torch.float64, device=device)

        def step() -> None:
            ti.solve(problem, start, rate, solver=ti.NewtonKrylov(), compile=compile).value.sum().backward()

        return step

    name = f"Bratu, {points} unknowns, Newton"
    return Case(name, lambda d: made(d, False), lambda d: made(d, True))


def energies(batch: int = 64, dim: int = 50) -> Case:
    """Convex energies by L-BFGS, with the gradient in their weights."""

    def made(device: str, compile: bool) -> Step:
        torch.manual_seed(0)
        w = (torch.randn(dim, dim) / dim**0.5).to(device).requires_grad_()
        x = torch.randn(batch, dim, device=device)

        def energy(z: Tensor, x: Tensor) -> Tensor:
            return torch.cosh(z @ w.T).sum(-1) + 0.5 * z.square().sum(-1) - (z * x).sum(-1)

        problem = ti.Minimum(energy)

        def step() -> None:
            found = ti.solve(problem, torch.zeros_like(x), x, solver=ti.LBFGS(), compile=compile)
            found.value.sum().backward()

        return step

    name = f"{batch} energies of {dim} unknowns, L-BFGS"
    return Case(name, lambda d: made(d, False), lambda d: made(d, True))


def layer(batch: int, dim: int, rtol: float) -> Case:
    """z = tanh(Wz + x), Anderson, implicit."""

    def made(device: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(dim, dim, generator=generator)
        w = 0.9 * w / torch.linalg.matrix_norm(w, 2)
        return w.to(device).requires_grad_(), (0.5 * torch.randn(batch, dim, generator=generator)).to(device)

    def ours(device: str, compile: bool) -> Step:
        w, x = made(device)
        problem = ti.FixedPoint(lambda z, x: torch.tanh(z @ w.T + x))
        solver, gradient = ti.Anderson(memory=5, rtol=rtol), ti.Implicit(linear_solver=ti.GMRES(rtol=rtol))

        def step() -> None:
            found = ti.solve(problem, torch.zeros_like(x), x, solver=solver, gradient=gradient, compile=compile)
            found.value.square().sum().backward()

        return step

    def peer(device: str) -> Step:
        import torchdeq

        w, x = made(device)
        usual = {"f_tol": rtol, "b_tol": rtol, "f_stop_mode": "rel", "b_stop_mode": "rel", "f_max_iter": 60}
        deq = torchdeq.get_deq(**usual, b_max_iter=60, f_solver="anderson", b_solver="anderson", ift=True)
        deq.train()

        def step() -> None:
            z, _ = deq(lambda z: torch.tanh(z @ w.T + x), torch.zeros_like(x))
            z[-1].square().sum().backward()

        return step

    name = f"batch {batch}, width {dim}, rtol {rtol:g}"
    return Case(name, lambda d: ours(d, False), lambda d: ours(d, True), peer)


def models(quick: bool) -> Iterator[Case]:
    """Those of the first table."""
    yield joint(4, 5, 16) if quick else joint()
    yield graphs(2, 5) if quick else graphs()
    yield van_der_pol(8, 5) if quick else van_der_pol()
    yield bratu(8) if quick else bratu()
    yield energies(4, 5) if quick else energies()
    if quick:
        return
    yield transformer()
    yield mdeq("MDEQ-small", mdeq_small(image_channels=3, downsamplings=2), 32, True)
    yield mdeq("MDEQ-small", mdeq_small(image_channels=3, downsamplings=2), 32, False)
    yield mdeq("MDEQ-Tiny", mdeq_tiny(), 4, True)


SETTINGS = [(b, 128, 1e-4) for b in (1, 16, 64, 256, 4096)] + [(64, d, 1e-4) for d in (16, 512, 2048)]
SETTINGS += [(64, 128, 1e-2), (64, 128, 1e-6)]


def peak(step: Step, device: str) -> float:
    """What one step holds at most above what was held before, in MiB, as torch's allocators count it."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / 2**20


def measured(case: Case, device: str, repeats: int) -> Row:
    """Times and memory of all that can take the step."""
    row: Row = {"model": case.name}
    steps: dict[str, Step] = {}
    for name in ("eager", "captured", "peer"):
        make = getattr(case, name)
        if make is None:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if name == "captured":
                warnings.simplefilter("error", CaptureWarning)
            step, error = record.attempt(lambda make=make: make(device))
            if error is None:
                begin = time.perf_counter()
                _, error = record.attempt(step)
                if name == "captured":
                    row["compiling s"] = time.perf_counter() - begin
        if error is None:
            steps[name] = step
        else:
            row[f"{name} failed"] = error
    times: dict[str, list[float]] = {name: [] for name in steps}
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    clock = time.process_time if device == "cpu" else time.perf_counter
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(repeats):
            for name, step in steps.items():
                begin = clock()
                step()
                wait()
                times[name].append(1e3 * (clock() - begin))
        for name, step in steps.items():
            row[f"{name} ms"] = sorted(times[name])[len(times[name]) // 2]
            row[f"{name} least ms"] = min(times[name])
            row[f"{name} MiB"] = peak(step, device)
    ahead = row.get("eager ms", 0.0), row.get("captured ms"), row.get("peer ms")
    if ahead[1]:
        row["eager / captured"] = ahead[0] / ahead[1]
    if ahead[2]:
        row["TorchDEQ / eager"] = ahead[2] / ahead[0]
        row["TorchDEQ / captured"] = ahead[2] / ahead[1] if ahead[1] else None
    return row


def jitted(python: str, settings: list[tuple[int, int, float]], repeats: int) -> dict[str, float]:
    """Milliseconds of the layers' steps by jitted jaxopt, in a process of its own."""
    given = json.dumps({"settings": settings, "repeats": repeats})
    script = Path(__file__).with_name("models_peers.py")
    done = subprocess.run([python, str(script)], input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-500:])
        return {}
    return {tuple_name(*found[:3]): found[3] for found in json.loads(done.stdout.splitlines()[-1])}


def tuple_name(batch: int, dim: int, rtol: float) -> str:
    """The name of a layer's row."""
    return f"batch {batch}, width {dim}, rtol {rtol:g}"


def panels(tables: dict[str, list[Row]]) -> list[Bars]:
    """Times by model."""
    return [
        Bars(
            title,
            "milliseconds a step",
            {
                row["model"]: {
                    name: row.get(f"{key} ms", 0.0)
                    for name, key in (("eager", "eager"), ("captured", "captured"), ("TorchDEQ", "peer"))
                    if row.get(f"{key} ms") or title == "Models"
                }
                for row in rows
            },
            log=True,
        )
        for title, rows in tables.items()
        if rows
    ]


def main() -> None:
    """Measure for as long as the budget lasts, and record."""
    options = record.arguments(__doc__.splitlines()[0], repeats=9, device="cpu", budget=3000.0, peers="")
    begin, load, left = time.perf_counter(), os.getloadavg(), []
    tables: dict[str, list[Row]] = {"Models": [], "Growth": []}
    settings = SETTINGS[:1] if options.quick else SETTINGS
    cases = [("Models", case) for case in models(options.quick)] + [("Growth", layer(*s)) for s in settings]
    if options.quick:
        cases[-1] = ("Growth", layer(4, 8, 1e-4))
    elif options.budget:  # what compiles quickly goes first
        cases.sort(key=lambda case: case[1].name.startswith(("MDEQ", "DEQ")))
    others = jitted(options.peers, settings, options.repeats) if options.peers else {}
    for title, case in cases:
        if time.perf_counter() - begin > options.budget:
            left.append(case.name)
            continue
        row = measured(case, options.device, options.repeats)
        if case.name in others:
            row["jaxopt ms"] = others[case.name]
        tables[title].append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    targets = [
        Target(f"{row['model']}: TorchDEQ / captured", row.get("TorchDEQ / captured"), ">=", 2.0)
        for row in tables["Models"]
        if "peer ms" in row and "captured ms" in row
    ] + [
        Target(f"{row['model']}: jitted jaxopt / captured", row["jaxopt ms"] / row["captured ms"], ">=", JITTED[width])
        for (batch, width, rtol), row in zip(settings, tables["Growth"], strict=False)
        if (batch, rtol) == (64, 1e-4) and width in JITTED and "jaxopt ms" in row and "captured ms" in row
    ]
    record.record(
        "models" if options.device == "cpu" else f"models_{options.device}",
        options,
        load_before=load,
        settings={
            "step": "the loss and its backward pass",
            "tolerances": f"relative {TOLERANCE:g} in both passes of the models; Broyden at most {FORWARD} and "
            f"{BACKWARD} steps",
            "growth": "z = tanh(Wz + x), |W| = 0.9, Anderson(5) and GMRES, the same tolerance in both passes",
            "peer": "TorchDEQ, with the same cell and tolerances",
        },
        rows=tables,
        columns={"Models": COLUMNS, "Growth": (*COLUMNS, "jaxopt ms")},
        targets=targets,
        panels=panels(tables),
        notes=[
            "Times are medians; the JSON has the least ones, and why something has no time.",
            "Memory is what a step holds at most above what was held before it, as torch's allocators count it.",
            f"Not reached within the budget: {', '.join(left)}." if left else "All cases were measured.",
        ],
    )


if __name__ == "__main__":
    main()
