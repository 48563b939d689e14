"""Uses in which an implicit gradient can be wrong without a word: ours, TorchDEQ, xitorch and TorchOpt, case by case.

    python benchmarks/faults.py

Every case has a reference: backpropagation through so many plain iterations that nothing changes any more, in float64
where the case is not one of float32. A library is *right*, *raises*, *warns* (a number that is wrong came out, and a
warning with it), is *WRONG* (without a warning), or has nothing of the kind ("–").
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import record  # isort: skip  (first: it sets the number of threads)

import torch
import torchdeq
import torchopt
import xitorch.optimize
from record import Row, attempt
from torch import Tensor

import torchimplicit as ti

D = torch.float64
RIGHT = {torch.float64: 1e-8, torch.float32: 1e-3}
"""The relative error up to which a gradient counts as right."""
STEPS = 2000
Step = Callable[..., Tensor]
Solve = Callable[..., Tensor]
TIGHT = {torch.float64: 1e-12, torch.float32: 1e-6}


# -------------------------------------------------------------------------------------------------------- the libraries


def unrolled(step: Step, z0: Tensor, *params: Tensor) -> Tensor:
    """The reference: plain iterations, remembered by autograd."""
    z = z0
    for _ in range(300):
        z = step(z, *params)
    return z


def ours(step: Step, z0: Tensor, *params: Tensor) -> Tensor:
    """Ours, with tolerances as tight as the others'."""
    tight = TIGHT[z0.dtype]
    gradient = ti.Implicit(linear_solver=ti.GMRES(rtol=tight))
    solver = ti.Anderson(rtol=tight, max_steps=STEPS)
    return ti.solve(ti.FixedPoint(step), z0, *params, solver=solver, gradient=gradient).value


def with_torchdeq(step: Step, z0: Tensor, *params: Tensor) -> Tensor:
    """TorchDEQ's implicit differentiation with its default solver, relative tolerances."""
    tight = TIGHT[z0.dtype]
    model = torchdeq.get_deq(
        ift=True, f_max_iter=STEPS, b_max_iter=STEPS, f_tol=tight, b_tol=tight, f_stop_mode="rel", b_stop_mode="rel"
    )
    return model(lambda z: step(z, *params), z0)[0][-1]


def with_xitorch(step: Step, z0: Tensor, *params: Tensor) -> Tensor:
    """xitorch's equilibrium by Broyden's method from plain iteration, and BiCGStab."""
    tight = TIGHT[z0.dtype]
    backward = {"method": "bicgstab", "rtol": tight, "atol": 0.0, "posdef": True, "max_niter": STEPS}
    forward = {"method": "broyden1", "alpha": -1.0, "f_rtol": tight, "maxiter": STEPS}
    return xitorch.optimize.equilibrium(step, z0, params=params, bck_options=backward, **forward)


def with_torchopt(step: Step, z0: Tensor, *params: Tensor) -> Tensor:
    """TorchOpt's custom_root around plain iteration, its default adjoint (normal CG) made tight."""
    tight = TIGHT[z0.dtype]
    linear = torchopt.linear_solve.solve_normal_cg(rtol=tight, atol=0.0, maxiter=STEPS)
    wanted = tuple(range(1, 1 + len(params)))

    @torchopt.diff.implicit.custom_root(lambda z, *p: step(z, *p) - z, argnums=wanted, solve=linear)
    def iterate(z: Tensor, *p: Tensor) -> Tensor:
        for _ in range(STEPS):
            z, previous = step(z, *p), z
            if bool((z - previous).norm() <= tight * z.norm()):
                break
        return z

    return iterate(z0, *params)


LIBRARIES: dict[str, Solve] = {
    "ours": ours,
    "TorchDEQ": with_torchdeq,
    "xitorch": with_xitorch,
    "TorchOpt": with_torchopt,
}


# ------------------------------------------------------------------------------------------------------------ the cases


def contraction(n: int, gain: float = 0.5, dtype: torch.dtype = D) -> Tensor:
    """A multiple of an orthogonal matrix."""
    return (gain * torch.linalg.qr(torch.randn(n, n, dtype=D)).Q).to(dtype)


def layer(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """The map of the cases that are about something else."""
    return torch.tanh(z @ w.T + x)


def error(found: Tensor, wanted: Tensor) -> float:
    """The relative error; infinite where what was found is not finite."""
    off = float((found.detach().double() - wanted.detach().double()).norm() / wanted.detach().double().norm())
    return off if off == off else float("inf")


def gradient_of(step: Step, z0: Tensor, x: Tensor, w: Tensor, solve: Solve) -> float:
    """The error of the gradient in the weights, against unrolling."""

    def gradient(solver: Solve) -> Tensor:
        leaf = w.clone().requires_grad_()
        return torch.autograd.grad(solver(step, z0, x, leaf).sin().sum(), leaf)[0]

    return error(gradient(solve), gradient(unrolled))


def batch_normalization(solve: Solve) -> float:
    """Statistics of the batch inside the map."""
    x, w = torch.randn(16, 6, dtype=D), contraction(6)

    def step(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return torch.tanh(0.5 * torch.nn.functional.batch_norm(z @ w.T + x, None, None, training=True))

    return gradient_of(step, torch.zeros_like(x), x, w, solve)


def attention(solve: Solve) -> float:
    """Samples that attend to each other."""
    x, w = torch.randn(8, 6, dtype=D), contraction(6)

    def step(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
        y = z @ w.T
        return torch.tanh(torch.softmax(y @ y.T, dim=1) @ y + x)

    return gradient_of(step, torch.zeros_like(x), x, w, solve)


def refilled(solve: Solve) -> float:
    """A buffer that the map reads is filled anew between the solve and its backward pass; plain torch raises."""
    x, w, z0 = torch.randn(4, 6, dtype=D), contraction(6).requires_grad_(), torch.zeros(4, 6, dtype=D)
    warmth = torch.ones((), dtype=D)
    wanted = torch.autograd.grad(unrolled(layer, z0, x, w).sum(), w)[0]
    value = solve(lambda z, x, w: torch.tanh(warmth * (z @ w.T) + x), z0, x, w)
    warmth.fill_(0.3)
    return error(torch.autograd.grad(value.sum(), w)[0], wanted)


def evaluation(solve: Solve) -> float:
    """The cell is put into evaluation mode between the solve and its backward pass."""
    x, w, z0 = torch.randn(16, 6, dtype=D), contraction(6).requires_grad_(), torch.zeros(16, 6, dtype=D)
    norm = torch.nn.BatchNorm1d(6, dtype=D, track_running_stats=True)

    def step(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return torch.tanh(0.5 * norm(z @ w.T + x))

    wanted = torch.autograd.grad(unrolled(step, z0, x, w).sin().sum(), w)[0]
    value = solve(step, z0, x, w)
    norm.eval()
    return error(torch.autograd.grad(value.sin().sum(), w)[0], wanted)


class Model(torch.nn.Module):
    """A model whose forward pass solves; what it captures is its parameter."""

    def __init__(self, solve: Solve):
        super().__init__()
        self.solve, self.w = solve, torch.nn.Parameter(contraction(6))

    def step(self, z: Tensor, x: Tensor) -> Tensor:
        """The map."""
        return layer(z, x, self.w)

    def forward(self, x: Tensor) -> Tensor:
        """The solution, by the way that each library has for captured parameters."""
        z0 = torch.zeros_like(x)
        if self.solve is with_xitorch:
            return self.solve(self.step, z0, x)
        if self.solve is with_torchopt:
            return self.solve(layer, z0, x, self.w)
        return self.solve(lambda z: self.step(z, x), z0)


def functional_call(solve: Solve) -> float:
    """The model with other parameters than its own."""
    model, x = Model(solve).requires_grad_(False), torch.randn(4, 6, dtype=D)
    w = contraction(6, 0.3).requires_grad_()
    wanted = torch.autograd.grad(unrolled(layer, torch.zeros_like(x), x, w).sin().sum(), w)[0]
    value = torch.func.functional_call(model, {"w": w}, (x,))
    return error(torch.autograd.grad(value.sin().sum(), w)[0], wanted)


def nonfinite(solve: Solve) -> float:
    """NaN in the cotangent must arrive in the weights, or nothing skips the step."""
    x, w = torch.randn(4, 6, dtype=D), contraction(6).requires_grad_()
    cotangent = torch.ones_like(x)
    cotangent[1, 2] = torch.nan
    found = torch.autograd.grad(solve(layer, torch.zeros_like(x), x, w), w, cotangent)[0]
    return 0.0 if not found.isfinite().all() else 1.0


def scaled(scale: float, solve: Solve) -> float:
    """A cotangent of another size, in float32: the gradient is that many times the usual one."""
    x, w = torch.randn(4, 6), contraction(6, dtype=torch.float32).requires_grad_()
    wanted = torch.autograd.grad(unrolled(layer, torch.zeros(4, 6), x, w).sum(), w)[0]
    value = solve(layer, torch.zeros(4, 6), x, w)
    return error(torch.autograd.grad(value, w, torch.full_like(x, scale))[0].double() / scale, wanted)


def small_state(solve: Solve) -> float:
    """A state of size 1e-12 in float32."""
    unit, x = 1e-12, torch.randn(4, 6)
    w = contraction(6, dtype=torch.float32)

    def step(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return unit * torch.tanh((z / unit) @ w.T + x)

    return gradient_at_scale(step, x, w, unit, solve)


def gradient_at_scale(step: Step, x: Tensor, w: Tensor, unit: float, solve: Solve) -> float:
    """The error of the gradient of the sum, which is ``unit`` times the usual one."""

    def gradient(solver: Solve) -> Tensor:
        leaf = w.clone().requires_grad_()
        return torch.autograd.grad(solver(step, torch.zeros_like(x), x, leaf).sum() / unit, leaf)[0]

    return error(gradient(solve), gradient(unrolled))


def detached(solve: Solve) -> float:
    """A map that autograd does not see: the linear part is computed under no_grad."""
    a, x = contraction(6), torch.randn(4, 6, dtype=D, requires_grad=True)

    def step(z: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = z @ a.T
        return y + x

    wanted = torch.autograd.grad(unrolled(lambda z, x: z @ a.T + x, torch.zeros(4, 6, dtype=D), x).sum(), x)[0]
    return error(torch.autograd.grad(solve(step, torch.zeros(4, 6, dtype=D), x).sum(), x)[0], wanted)


def nested(solve: Solve) -> float:
    """An equilibrium whose map solves another one, in forward mode."""
    w, z0 = contraction(6), torch.zeros(4, 6, dtype=D)
    x, v = torch.randn(4, 6, dtype=D), torch.randn(4, 6, dtype=D)

    def outer(solver: Solve, x: Tensor) -> Tensor:
        def step(z: Tensor, x: Tensor) -> Tensor:
            return 0.5 * solver(lambda y, z, x: torch.tanh(0.5 * y @ w.T + 0.3 * z + x), z0, z, x)

        return solver(step, z0, x)

    wanted = torch.func.jvp(lambda x: long_outer(w, z0, x), (x,), (v,))[1]
    return error(torch.func.jvp(lambda x: outer(solve, x), (x,), (v,))[1], wanted)


def long_outer(w: Tensor, z0: Tensor, x: Tensor) -> Tensor:
    """The nested equilibrium by plain iterations of both."""
    z = z0
    for _ in range(40):
        y = z0
        for _ in range(60):
            y = torch.tanh(0.5 * y @ w.T + 0.3 * z + x)
        z = 0.5 * y
    return z


def threads(solve: Solve) -> float:
    """Four threads that train layers of their own: the worst error of 40 gradients."""
    worst: list[float] = []
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(4, 6, dtype=D, generator=generator)
        model = Model(solve)
        wanted = torch.autograd.grad(unrolled(layer, torch.zeros_like(x), x, model.w).sin().sum(), model.w)[0]
        try:
            for _ in range(10):
                worst.append(error(torch.autograd.grad(model(x).sin().sum(), model.w)[0], wanted))
        except Exception as failure:
            failures.append(failure)

    running = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if failures:
        raise failures[0]
    return max(worst)


def steep(solve: Solve) -> float | None:
    """The root of z^5 + z = x at x = 1e-3, from z = 1000, everything at its default, in float64."""
    x, z0 = torch.tensor([[1e-3]], dtype=D, requires_grad=True), torch.full((1, 1), 1e3, dtype=D)

    def residual(z: Tensor, x: Tensor) -> Tensor:
        return z**5 + z - x

    if solve is ours:
        value = ti.solve(ti.Root(residual), z0, x).value
    elif solve is with_xitorch:
        value = xitorch.optimize.rootfinder(residual, z0, params=(x,))
    else:
        return None
    return max(error(value, torch.full((1, 1), 1e-3, dtype=D)), abs(float(torch.autograd.grad(value.sum(), x)[0]) - 1))


def saddle(solve: Solve) -> float | None:
    """The minimum of Himmelblau's function from (1, 1), where Newton's method on the gradient climbs to a saddle."""

    def energy(p: Tensor) -> Tensor:
        return (p[0] ** 2 + p[1] - 11) ** 2 + (p[0] + p[1] ** 2 - 7) ** 2

    z0 = torch.ones(2, dtype=D)
    if solve is ours:
        value = ti.solve(ti.Minimum(energy, batched=False), z0, solver=ti.NewtonKrylov()).value
    elif solve is with_xitorch:
        value = xitorch.optimize.minimize(energy, z0)
    else:
        return None
    return float(energy(value.detach()))


CASES: dict[str, tuple[Callable[[Solve], float | None], torch.dtype, str]] = {
    "batch normalization in the map": (batch_normalization, D, "tests/gradients/test_coupled.py"),
    "attention over the batch": (attention, D, "tests/gradients/test_coupled.py"),
    "a buffer refilled before backward": (refilled, D, "tests/truth/test_world.py"),
    "eval() before backward": (evaluation, D, "tests/truth/test_world.py"),
    "functional_call": (functional_call, D, "tests/truth/test_world.py"),
    "NaN in the cotangent": (nonfinite, D, "tests/truth/test_nonfinite.py"),
    "a cotangent of 1e-23, float32": (
        lambda s: scaled(1e-23, s),
        torch.float32,
        "torchimplicit/testing/gradient_suite.py",
    ),
    "a cotangent of 1e20, float32": (
        lambda s: scaled(1e20, s),
        torch.float32,
        "torchimplicit/testing/gradient_suite.py",
    ),
    "a state of size 1e-12, float32": (small_state, torch.float32, "torchimplicit/testing/solver_suite.py"),
    "a steep start of a root": (steep, D, "tests/solvers/test_tolerance.py"),
    "a saddle on the way of a minimum": (saddle, D, "tests/solvers/test_newton_krylov.py"),
    "an equilibrium in an equilibrium, jvp": (nested, D, "tests/truth/test_nested.py"),
    "a map under no_grad": (detached, D, "tests/life/test_hidden_maps.py"),
    "four threads": (threads, D, "tests/truth/test_threads.py"),
}


def judge(case: Callable[[Solve], float | None], solve: Solve, right: float, seed: int) -> tuple[float | None, str]:
    """The error, and the verdict in words."""
    torch.manual_seed(seed)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found, failure = attempt(lambda: case(solve))
    if failure:
        return None, f"raises: {failure}"
    if found is None:
        return None, "–"
    if found <= right:
        return found, "right"
    about = [w for w in said if "onverge" in type(w.message).__name__ + str(w.message)]
    return found, f"warns, {found:.2g} off" if about else f"WRONG, {found:.2g} off"


def main() -> None:
    """Run every case with every library."""
    options = record.arguments(__doc__ or "")
    rows: list[Row] = []
    raised: dict[str, int] = {}
    for name, (case, dtype, held_by) in CASES.items():
        row: Row = {"case": name, "held by": held_by}
        for library, solve in LIBRARIES.items():
            row[f"{library}: error"], verdict = judge(case, solve, RIGHT[dtype], options.seed)
            if verdict.startswith("raises: "):
                row[f"{library}: exception"] = message = verdict.removeprefix("raises: ")
                verdict = f"raises [{raised.setdefault(message, len(raised) + 1)}]"
            row[library] = verdict
        rows.append(row)
        print(row, flush=True)
    wrong = sum(str(row["ours"]).startswith("WRONG") for row in rows)
    record.record(
        "faults",
        options,
        settings={
            "gradient right": "within 1e-8 of unrolling in float64, 1e-3 in float32",
            "tolerances": "1e-12 in float64, 1e-6 in float32, relative, forward and adjoint; at most 2000 steps",
        },
        rows={"Right or wrong": rows},
        columns={"Right or wrong": ["case", *LIBRARIES, "held by"]},
        targets=[record.Target("ours: wrong without a word", float(wrong), "<=", 0.0)],
        notes=[
            "WRONG: a number without an error or a warning; the figure is the relative error of the gradient (of the "
            "saddle, the energy, whose minimum is 0; of NaN, whether it arrived).",
            "Where plain torch raises its own in-place error (a refilled buffer), raising is as good as being right.",
            "What a library has nothing for is –. Libraries that are not in the table were not measured.",
            *[f"[{k}] {message}" for message, k in raised.items()],
        ],
    )


if __name__ == "__main__":
    main()
