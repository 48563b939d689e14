from __future__ import annotations

import re
import threading
import warnings

import pytest
import torch
from torch import nn

import torchimplicit as ti
from torchimplicit import Anderson, FixedPoint, FixedPointIteration, Implicit
from torchimplicit.captured import compilations
from torchimplicit.errors import CaptureWarning, ConvergenceWarning, SolveError
from torchimplicit.solution import Status

DIM = 6


def problem_of(w, scale=1.0):
    """A problem whose lambda is made anew each time."""
    return FixedPoint(lambda z, x: scale * torch.tanh(z @ w.T + x))


def weight(seed=0, requires_grad=True):
    generator = torch.Generator().manual_seed(seed)
    return (0.8 * torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)).Q).requires_grad_(
        requires_grad
    )


def inputs(batch, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, DIM, generator=generator, dtype=torch.float64)
    return torch.zeros_like(x), x.requires_grad_()


def solved(batch=5, w=None, x=None, compile=True, scale=1.0, solver=None, **options):
    w = weight() if w is None else w
    z0, own = inputs(batch)
    solver = solver or Anderson(memory=2, rtol=1e-12)
    return ti.solve(problem_of(w, scale), z0, own if x is None else x, solver=solver, compile=compile, **options)


@pytest.fixture(autouse=True)
def nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        yield


def dense_gradient(z, w, x, u):
    """Of <u, z> in (w, x), by the dense adjoint of each sample."""
    slope = 1 - z**2
    rows = []
    for s, one in zip(slope, u, strict=True):
        rows.append(torch.linalg.solve(torch.eye(DIM, dtype=z.dtype) - (s[:, None] * w).T, one))
    g = torch.stack(rows) * slope
    return g.T @ z, g


def test_value_figures_and_gradient_are_those_of_the_eager_loop():
    w, (_, x) = weight(), inputs(5)
    one, two = solved(w=w, x=x, compile=False), solved(w=w, x=x)
    torch.testing.assert_close(two.value, one.value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(two.residual, one.residual, rtol=1e-2, atol=1e-15)
    assert torch.equal(two.steps, one.steps)
    assert torch.equal(two.status, one.status)
    assert two.evaluations == one.evaluations
    u = torch.randn(5, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    # a loop that autograd ran through would give the derivative of one step here, and say nothing
    found = torch.autograd.grad(two.value, (w, x), u)
    for got, expected in zip(found, dense_gradient(two.value.detach(), w.detach(), x.detach(), u), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert two.adjoint.converged.all()
    assert two.adjoint.residual.max() <= 1e-10
    _, one_step = torch.autograd.grad(torch.tanh(two.value.detach() @ w.T + x), (w, x), u)
    assert (one_step - found[1]).norm() > 0.1 * found[1].norm()


def test_other_lambdas_other_batches_and_other_tensors_are_served_by_one_compilation():
    solved()
    before = compilations()
    for batch, seed in ((5, 1), (9, 2), (3, 4), (64, 5)):
        w, (z0, x) = weight(seed), inputs(batch, seed)
        found = ti.solve(problem_of(w), z0, x, solver=Anderson(memory=2, rtol=1e-12), compile=True)
        assert (torch.tanh(found.value @ w.T + x) - found.value).abs().max() < 1e-11
        u = torch.ones_like(x)
        for got, expected in zip(
            torch.autograd.grad(found.value, (w, x), u),
            dense_gradient(found.value.detach(), w.detach(), x.detach(), u),
            strict=True,
        ):
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
    assert compilations() == before


def test_rows_that_are_not_finite_leave_the_others_alone():
    w, (_, x) = weight(), inputs(5)
    with torch.no_grad():
        good = solved(w=w, x=x)
        spoilt = x.detach().clone().requires_grad_()
        spoilt.data[2, 1] = torch.nan
    with pytest.raises(SolveError, match=r"1 of 5 samples \(2\)") as caught:
        solved(w=w, x=spoilt)
    bad = caught.value.solution
    rows = [0, 1, 3, 4]
    assert bad.status[2] == Status.NONFINITE
    assert torch.equal(bad.value[rows], good.value[rows])
    assert torch.equal(bad.steps[rows], good.steps[rows])
    assert (bad.value[2] == 0).all()


def test_cotangents_of_any_size_and_of_none():
    w, (_, x) = weight(), inputs(4)
    found = solved(4, w=w, x=x)
    u = torch.ones(4, DIM, dtype=torch.float64) * torch.tensor([1.0, 1e-200, 0.0, 1e150], dtype=torch.float64)[:, None]
    _, got = torch.autograd.grad(found.value, (w, x), u)
    _, expected = dense_gradient(found.value.detach(), w.detach(), x.detach(), u)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm()
    u[1] = torch.nan
    found = solved(4, w=w, x=x)
    with pytest.warns(ConvergenceWarning):
        _, got = torch.autograd.grad(found.value, (w, x), u)
    assert got[1].isnan().all()
    assert (got[0] - expected[0]).norm() <= 1e-9 * expected[0].norm()


def test_higher_orders_and_transforms_take_the_eager_path_and_are_right():
    w, (z0, x) = weight(), inputs(2)
    seconds = []
    for compile in (False, True):
        found = solved(2, w=w, x=x, compile=compile)
        (first,) = torch.autograd.grad(found.value.sin().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        seconds.append(second)
    torch.testing.assert_close(seconds[1], seconds[0], rtol=1e-8, atol=1e-8)

    def value(x, compile):
        return ti.solve(problem_of(w.detach()), z0, x, solver=Anderson(rtol=1e-12), compile=compile).value

    one, two = (torch.func.jacrev(lambda x, c=c: value(x, c))(x.detach()) for c in (False, True))
    torch.testing.assert_close(one, two)


def test_a_tensor_written_to_since_is_an_error_as_without():
    w, (_, x) = weight(), inputs(3)
    found = solved(3, w=w, x=x)
    with torch.no_grad():
        w.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.value.sum().backward()


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(DIM, DIM, dtype=torch.float64)
        with torch.no_grad():
            self.inner.weight.copy_(weight())

    def forward(self, z, x):
        return torch.tanh(self.inner(z) + x)


def test_training_compiles_once():
    runs = []
    data = torch.randn(20, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = compilations()
    for compile in (False, True):
        torch.manual_seed(0)
        layer = ti.nn.Equilibrium(Cell(), solver=FixedPointIteration(rtol=1e-11, max_steps=500), compile=compile)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
        losses = []
        for step in range(200):
            batch = data[:8] if step % 3 == 0 else data[8:16] if step % 3 == 1 else data[16:]
            loss = (layer(batch) - 0.5).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append(losses)
    assert compilations() == before + 1
    torch.testing.assert_close(torch.tensor(runs[0]), torch.tensor(runs[1]), rtol=1e-7, atol=0)
    assert runs[1][-1] < runs[1][0]


# -- what is not captured ----------------------------------------------------------------------


def branching(z, x):
    return torch.tanh(0.3 * z + x) if z.sum() > -1e9 else z


def noting(notes):
    def f(z, x):
        out = torch.tanh(0.3 * z + x)
        notes.append(out)
        return out

    return f


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, z, x):
        self.count += 1
        return torch.tanh(0.3 * z + x)


@pytest.mark.parametrize(
    ("f", "words"),
    [
        (branching, "not captured"),
        (noting([]), "keeps tensors"),
        (Counting(), "keeps tensors|writes to"),
        (lambda z, x: torch.tanh(0.3 * z + x) + 1e-14 * torch.rand_like(z), "random numbers"),
        (lambda z, x: torch.tanh(x), "depend on the whole of its state"),
    ],
    ids=["branch", "side effect", "buffer", "random", "constant"],
)
def test_a_warning_names_the_reason_and_the_eager_loop_serves(f, words):
    z0, x = inputs(3)
    plain, before = ti.solve(FixedPoint(f), z0, x), ti.solve_counts()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            found = ti.solve(FixedPoint(f), z0, x, compile=True)
            torch.testing.assert_close(found.value, plain.value, rtol=1e-9, atol=1e-9)
    one, two = (w for w in told if issubclass(w.category, CaptureWarning))
    assert re.search(words, str(one.message))
    assert str(one.message) == str(two.message)
    assert one.filename == __file__
    ((kind, count),) = (ti.solve_counts() - before).warnings.items()
    assert kind.startswith("not captured: ")
    assert count == 2


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kind", [FixedPoint, ti.Minimum])
def test_functions_that_make_tensors_are_captured(kind):
    def f(z, x):
        ramp = torch.linspace(0, 1, DIM, dtype=z.dtype) + torch.arange(DIM) / 10
        if kind is FixedPoint:
            return 0.5 * ramp * torch.tanh(z) + x
        return (0.5 * (1 + ramp) * (z - x) ** 2 + torch.sqrt(1 + z**2)).sum(-1)

    z0, x = inputs(4)
    solver = Anderson(rtol=1e-12) if kind is FixedPoint else ti.GradientDescent(rtol=1e-12, step_size=0.4)
    before, found = compilations(), []
    for compile in (True, False):
        solution = ti.solve(kind(f), z0, x, solver=solver, compile=compile)
        found.append((solution.value, *torch.autograd.grad(solution.value.square().sum(), x)))
    assert compilations() == before + 1
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("interpreted")
def test_numbers_that_a_function_holds_keep_their_precision():
    """Each is compiled in: as a symbol, it would be rounded to single precision."""
    z0, x = inputs(3)
    before = compilations()
    for i, unit in enumerate((1.0, 1e-12, 1e-6)):
        f = FixedPoint(lambda z, x, unit=unit: unit * torch.tanh(0.3 * z / unit + x))
        found = ti.solve(f, unit * z0, x, solver=Anderson(), compile=True)
        assert compilations() == before + i + 1
        plain = ti.solve(f, unit * z0, x, solver=Anderson())
        torch.testing.assert_close(found.value, plain.value, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("problem", "options", "words"),
    [
        (ti.Root(lambda z, x: z - torch.tanh(0.3 * z + x)), {"solver": ti.TrustRegion()}, "TrustRegion"),
        (
            ti.Minimum(lambda z, x: (z - x).square().sum(-1), constraint=ti.Box(-1, 1)),
            {"solver": ti.ProjectedNewton()},
            "constraint",
        ),
        (FixedPoint(lambda z, x: torch.tanh(0.3 * z + x)), {"gradient": ti.Unrolled()}, "Unrolled"),
        (FixedPoint(lambda z, x: torch.tanh(0.3 * z + x)), {"solver": Anderson(keep_trajectory=True)}, "trajectory"),
    ],
)
def test_what_has_no_compiled_form_says_so(problem, options, words):
    z0, x = inputs(3)
    with pytest.warns(CaptureWarning, match=words):
        found = ti.solve(problem, z0, x, compile=True, **options)
    assert torch.equal(found.value, ti.solve(problem, z0, x, **options).value)


def test_a_machine_without_a_compiler(monkeypatch):
    import torch._inductor.compile_fx as inductor

    def none(*args, **kwargs):
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(inductor, "compile_fx", none)
    z0, x = inputs(3)
    with pytest.warns(CaptureWarning, match=r"no C\+\+ compiler"):
        found = ti.solve(FixedPoint(lambda z, x: torch.tanh(0.25 * z + x)), z0, x, compile=True)
    assert found.converged.all()


def test_an_older_torch(monkeypatch):
    monkeypatch.setattr("torchimplicit.captured.program.TORCH_RELEASE", (2, 12))
    z0, x = inputs(3)
    problem = FixedPoint(lambda z, x: torch.tanh(0.25 * z + x))
    with pytest.warns(CaptureWarning, match=r"2\.13 or newer"):
        found = ti.solve(problem, z0, x, compile=True)
    assert torch.equal(found.value, ti.solve(problem, z0, x).value)


# -- longer ones ----------------------------------------------------------------------


@pytest.mark.long
def test_rows_that_depend_on_each_other():
    def f(z, x):
        return torch.tanh(0.4 * z + 0.4 * z.mean(0) + x)

    z0, x = inputs(4)
    grads = []
    for compile in (False, True):
        found = ti.solve(FixedPoint(f), z0, x, solver=Anderson(rtol=1e-12), compile=compile)
        u = torch.ones(4, DIM, dtype=torch.float64) * torch.tensor([1.0, 1e-3, 1e3, 0.0], dtype=torch.float64)[:, None]
        grads.append(torch.autograd.grad(found.value, x, u)[0])
    z = torch.zeros_like(x)
    for _ in range(300):
        z = f(z, x)
    (expected,) = torch.autograd.grad(z, x, u)
    for got in grads:
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.long
@pytest.mark.parametrize("batched", [True, False])
def test_trees(batched):
    w = weight()

    def f(z, x):
        return {"a": torch.tanh(z["b"] @ w + x), "b": 0.5 * torch.sin(z["a"])}

    _, x = inputs(3)
    z0 = {"a": torch.zeros(3, DIM, dtype=torch.float64), "b": torch.zeros(3, DIM, dtype=torch.float64)}
    one, two = (
        ti.solve(FixedPoint(f, batched=batched), z0, x, solver=Anderson(rtol=1e-12), compile=c) for c in (False, True)
    )
    grads = []
    for found in (one, two):
        grads.append(torch.autograd.grad(found.value["a"].sum(), (w, x)))
    torch.testing.assert_close(two.value, one.value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-8, atol=1e-8)
    assert torch.equal(one.steps, two.steps)


@pytest.mark.long
@pytest.mark.parametrize("solver", [Anderson, FixedPointIteration])
def test_the_step_budget_and_the_best_iterate(solver):
    w, (_, x) = weight(), inputs(4)
    chosen = solver(rtol=1e-12, max_steps=5)
    found = []
    for compile in (False, True):
        with pytest.warns(ConvergenceWarning, match="MAX_STEPS"):
            found.append(solved(4, w=w, x=x, compile=compile, solver=chosen))
    one, two = found
    assert torch.equal(one.status, two.status)
    assert torch.equal(one.steps, two.steps)
    torch.testing.assert_close(one.value, two.value)
    torch.testing.assert_close(one.residual, two.residual)


@pytest.mark.long
def test_what_grows_without_bound_stops_at_its_best_iterate():
    w, (_, x) = weight(), inputs(4)
    found = []
    for compile in (False, True):
        f = FixedPoint(lambda z, x: 3 * z @ w + x)
        with pytest.warns(ConvergenceWarning, match="without bound"):
            found.append(ti.solve(f, x.detach() * 0, x, solver=FixedPointIteration(), compile=compile, throw=False))
    assert torch.equal(found[0].status, found[1].status)
    assert torch.equal(found[0].steps, found[1].steps)
    torch.testing.assert_close(found[0].value, found[1].value)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    w, (z0, x) = weight().detach().to(dtype).requires_grad_(), inputs(4)
    x = x.detach().to(dtype).requires_grad_()
    found = ti.solve(problem_of(w), z0.to(dtype), x, compile=True)
    assert found.value.dtype == dtype
    assert found.converged.all()
    found.value.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.usefixtures("interpreted")
def test_autocast():
    """The cast of a weight is part of each trace: one that autocast remembered would be a constant of the graph."""
    layer = nn.Linear(6, 6)
    z0, x = torch.zeros(4, 6), torch.randn(4, 6, requires_grad=True)
    values = []
    for compile in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("error")
            f = FixedPoint(lambda z, x: 0.5 * torch.tanh(layer(z)) + x)
            found = ti.solve(
                f, z0, x, gradient=ti.UnrolledPhantom(steps=2), solver=Anderson(rtol=1e-2), compile=compile
            )
        values.append((found.value, *torch.autograd.grad(found.value.sum(), (x, layer.weight))))
    torch.testing.assert_close(*values, rtol=0.05, atol=0.05)


@pytest.mark.long
def test_autocast_and_another_linear_solver():
    w, (z0, x) = weight().detach().float().requires_grad_(), inputs(4)
    z0, x = z0.float(), x.detach().float().requires_grad_()
    grads = []
    for compile in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = ti.solve(problem_of(w), z0, x, gradient=Implicit(linear_solver=ti.Neumann()), compile=compile)
        assert found.value.dtype == torch.float32
        grads.append(torch.autograd.grad(found.value.sum(), (w, x)))
    torch.testing.assert_close(grads[0], grads[1], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("unit", [1e-8, 1e8])
@pytest.mark.usefixtures("interpreted")
def test_leaves_in_units_of_their_own_take_the_steps_of_the_eager_loop(unit):
    w, x = weight(requires_grad=False), inputs(5)[1].detach()

    def f(state, x):
        a, b = state[0], state[1] / unit
        return torch.tanh(a @ w + 0.3 * b + x), unit * torch.tanh(0.5 * b - 0.3 * a + x)

    start = torch.zeros_like(x), torch.zeros_like(x)
    solver = Anderson(memory=2, rtol=1e-12)
    eager, captured = (ti.solve(FixedPoint(f), start, x, solver=solver, compile=c) for c in (False, True))
    assert captured.converged.all()
    assert (captured.steps - eager.steps).abs().max() <= 1
    torch.testing.assert_close(captured.value[1] / unit, eager.value[1] / unit, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("unit", [1e-30, 1e30])
@pytest.mark.usefixtures("interpreted")
def test_a_leaf_whose_residual_appears_after_the_start_is_judged_in_its_own_unit(unit):
    w, x = weight(requires_grad=False), inputs(5)[1].detach()

    def f(state, x, unit):
        return torch.tanh(state[0] @ w + x), 0.5 * state[1] + unit * state[0]

    start, size = [torch.zeros_like(x), torch.zeros_like(x)], torch.tensor(unit, dtype=torch.float64)
    for solver in (Anderson(memory=2, rtol=[1e-12, 1e-10]), Anderson(memory=2, max_steps=4)):
        found = []
        for compile in (False, True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                problem = FixedPoint(lambda z, x, u: list(f(z, x, u)))
                found.append(ti.solve(problem, start, x, size, solver=solver, compile=compile))
        eager, captured = found
        assert torch.equal(captured.status, eager.status)
        assert torch.equal(captured.steps, eager.steps)
        torch.testing.assert_close(captured.value[1] / unit, eager.value[1] / unit, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(captured.residual, eager.residual, rtol=1e-2, atol=1e-14)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float64, 1e160), (torch.float32, 1e-25)])
@pytest.mark.usefixtures("interpreted")
def test_numbers_whose_squares_leave_the_dtype_are_solved_as_by_the_eager_loop(dtype, unit):
    """They overflow, so that every residual is within the tolerance, or vanish."""
    w, x = weight(requires_grad=False).to(dtype), inputs(5)[1].detach().to(dtype).requires_grad_()
    problem = FixedPoint(lambda z, x: unit * torch.tanh(z / unit @ w.T + x))
    eager, captured = (ti.solve(problem, torch.zeros_like(x), x, compile=c) for c in (False, True))
    assert captured.converged.all()
    torch.testing.assert_close(captured.value / unit, eager.value / unit, rtol=1e-5, atol=1e-5)
    got, expected = (torch.autograd.grad((s.value / unit).sum(), x)[0] for s in (captured, eager))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torchimplicit.errors.ConvergenceWarning")
@pytest.mark.usefixtures("interpreted")
def test_a_leaf_whose_squares_overflow_has_its_gradient():
    w, x, unit = weight(requires_grad=False), inputs(4)[1], 1e160

    def f(state, x):
        return unit * torch.tanh(state[1] @ w.T + x), 0.5 * torch.sin(state[0] / unit) + 0.1 * state[1]

    grads, start = [], (torch.zeros(4, DIM, dtype=torch.float64), torch.zeros(4, DIM, dtype=torch.float64))
    for compile in (False, True):
        found = ti.solve(FixedPoint(f), start, x, solver=Anderson(rtol=1e-11), compile=compile, throw=False).value
        grads.append(torch.autograd.grad((found[0] / unit).sin().sum() + found[1].sin().sum(), x)[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("interpreted")
def test_hooks_that_a_module_is_given_later_are_seen():
    """By default, the compiler guards no hooks."""
    z0, x = inputs(3)
    cell = Cell()

    def same():
        eager, captured = (ti.solve(FixedPoint(cell), z0, x, solver=Anderson(rtol=1e-12), compile=c) for c in (0, 1))
        torch.testing.assert_close(captured.value, eager.value, rtol=1e-9, atol=1e-10)
        return captured.value

    first = same()
    handle = cell.inner.register_forward_hook(lambda module, args, out: 0.3 * out)
    assert (same() - first).abs().max() > 0.1
    handle.remove()
    assert torch.equal(same(), first)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: 0.5 * out)
    with pytest.raises(CaptureWarning, match="hooks of all modules"):
        same()
    handle.remove()


@pytest.mark.usefixtures("interpreted")
def test_threads_do_not_disturb_each_other():
    found = {}

    def work(seed):
        w, (z0, x) = weight(seed), inputs(2 + seed, seed)
        for _ in range(3):
            value = ti.solve(problem_of(w), z0, x, solver=Anderson(memory=2, rtol=1e-12), compile=True).value
        found[seed] = value, w, x, torch.autograd.grad(value.sum(), (w, x))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    before = compilations()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compilations() == before + 1
    for value, w, x, grads in found.values():
        expected = dense_gradient(value.detach(), w.detach(), x.detach(), torch.ones_like(x))
        torch.testing.assert_close(grads, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("part", ["compiled_forward", "compiled_adjoint"])
def test_compiled_code_that_raises_gives_way_to_the_eager_loop(part, monkeypatch):
    def broken(*inputs):
        raise NameError("name 's33' is not defined")

    monkeypatch.setattr(f"torchimplicit.captured.program.{part}", lambda *args: broken)
    w, (z0, x) = weight(requires_grad=False), inputs(3)
    functions = {  # a program each
        "compiled_forward": lambda z, x: torch.tanh(z @ w.T + x),
        "compiled_adjoint": lambda z, x: torch.tanh(x + z @ w.T),
    }
    problem, before = FixedPoint(functions[part]), ti.solve_counts()
    (expected,) = torch.autograd.grad(ti.solve(problem, z0, x, solver=Anderson(rtol=1e-12)).value.sum(), x)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            value = ti.solve(problem, z0, x, solver=Anderson(rtol=1e-12), compile=True).value
            (got,) = torch.autograd.grad(value.sum(), x)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
        assert all("NameError: name 's33'" in str(one.message) for one in told)
    assert any("NameError" in kind for kind in (ti.solve_counts() - before).warnings)
