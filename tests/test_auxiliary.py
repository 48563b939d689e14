"""What a map returns beside the state: its value, its derivatives, and what it costs."""

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import torchimplicit as ti

GRADIENTS = {
    "implicit": ti.Implicit(),
    "one-step": ti.OneStep(),
    "neumann": ti.NeumannPhantom(),
    "phantom": ti.UnrolledPhantom(steps=3, damping=1.0),
    "unrolled": ti.Unrolled(),
}
SOLVERS = {
    "anderson": ti.Anderson(),
    "iteration": ti.FixedPointIteration(),
    "given": ti.FixedPointIteration(steps=4),
    "broyden": ti.Broyden(),
}


def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 5, 0.2), (5, 3, 1.0), (4, 5, 1.0))
    given = (scale * torch.randn(a, b, generator=generator, dtype=torch.float64) for a, b, scale in shapes)
    return tuple(t.requires_grad_() for t in given)


class Map:
    """``z = tanh(z W + x)`` and what it is read out to, with a count of its calls."""

    def __init__(self, w: Tensor, v: Tensor):
        self.w, self.v, self.calls = w, v, 0

    def image(self, z, x):
        self.calls += 1
        return torch.tanh(z @ self.w + x)

    def __call__(self, z, x):
        return self.image(z, x), {"logits": self.read(z, x), "step": 3, "best": z.argmax(-1)}

    def read(self, z, x):
        return z @ self.v + x[..., :3]

    def solve(self, x, aux=True, **options):
        problem = ti.FixedPoint(self if aux else self.image, has_aux=aux, rowwise=options.pop("rowwise", False))
        return ti.solve(problem, torch.zeros_like(x), x, **options)


def unrolled(f, x, steps=300):
    z = torch.zeros_like(x)
    for _ in range(steps):
        z = f.image(z, x)
    return z, f.read(z, x)


def loss(z, logits):
    return z.sin().sum() + logits.square().sum()


def close(got, expected, rtol=1e-8):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("rowwise", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
def test_it_costs_no_evaluation(gradient, solver, grad, rowwise):
    w, v, x = tensors()
    counts = []
    for aux in (False, True):
        f = Map(w, v)
        with torch.set_grad_enabled(grad):
            solution = f.solve(x, aux, solver=solver, gradient=gradient, rowwise=rowwise)
        counts.append((f.calls, solution.evaluations))
    last = gradient.recorded(solver) or (grad and gradient.goes_on)
    if not last:
        torch.testing.assert_close(solution.aux["logits"], f.read(solution.value, x))
        assert torch.equal(solution.aux["best"], solution.value.argmax(1))
    assert solution.aux["logits"].requires_grad == grad
    assert solution.aux["step"] == 3
    (without, _), (beside, _) = counts
    if solver.steps and not grad and not last:  # nothing else is evaluated at the value
        assert beside == without + 1
        assert solution.evaluations == solver.steps + 1
    else:
        assert beside <= without


@pytest.mark.parametrize("solver", [SOLVERS["anderson"], SOLVERS["iteration"]])
@pytest.mark.parametrize("rowwise", [True, False])
def test_first_and_second_derivatives_are_those_of_unrolling(rowwise, solver):
    w, v, x = tensors()
    f = Map(w, v)
    solution = f.solve(x, solver=solver, rowwise=rowwise)

    def derivatives(z, logits):
        first = torch.autograd.grad(loss(z, logits), (x, w, v), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, w, v))
        return *first, *second

    close(derivatives(solution.value, solution.aux["logits"]), derivatives(*unrolled(f, x)))


@pytest.mark.parametrize("with_value", [True, False])
def test_alone_or_with_the_value(with_value):
    w, v, x = tensors()
    f = Map(w, v)

    def of(z, logits):
        return loss(z if with_value else z.detach() * 0, logits)

    solution = f.solve(x)
    got = torch.autograd.grad(of(solution.value, solution.aux["logits"]), (x, w, v))
    close(got, torch.autograd.grad(of(*unrolled(f, x)), (x, w, v)))


def test_unrolled_phantom_is_the_loop_by_hand():
    w, v, x = tensors()
    f = Map(w, v)
    solver = ti.FixedPointIteration(steps=4)
    solution = f.solve(x, solver=solver, gradient=GRADIENTS["phantom"])
    with torch.no_grad():
        z, _ = unrolled(f, x, steps=4)
    for _ in range(3):
        z, aux = f(z, x)
    close((solution.value, solution.aux["logits"]), (z, aux["logits"]))
    got = torch.autograd.grad(loss(solution.value, solution.aux["logits"]), (x, w, v))
    close(got, torch.autograd.grad(loss(z, aux["logits"]), (x, w, v)))


@pytest.mark.parametrize("gradient", [ti.OneStep(), ti.Unrolled()])
def test_a_given_number_of_steps_is_the_loop_by_hand(gradient):
    w, v, x = tensors()
    f = Map(w, v)
    solution = f.solve(x, solver=ti.FixedPointIteration(steps=4), gradient=gradient)
    with torch.set_grad_enabled(isinstance(gradient, ti.Unrolled)):
        z, _ = unrolled(f, x, steps=3)
    z, aux = f(z, x)
    got = torch.autograd.grad(loss(solution.value, solution.aux["logits"]), (x, w, v))
    close(got, torch.autograd.grad(loss(z, aux["logits"]), (x, w, v)))


def test_one_step_differentiates_the_reading_with_the_state_it_estimates():
    w, v, x = tensors()
    f = Map(w, v)
    solution = f.solve(x, gradient=ti.OneStep())
    z = f.image(solution.value.detach(), x)
    got = torch.autograd.grad(loss(solution.value, solution.aux["logits"]), (x, w, v))
    close(got, torch.autograd.grad(loss(z, f.read(z, x)), (x, w, v)))


@pytest.mark.parametrize("inner", [ti.Implicit(), ti.UnrolledPhantom(steps=2, damping=1.0)])
@pytest.mark.parametrize("instead", [0.5, ti.NeumannPhantom()])
def test_samples_that_were_not_solved_keep_what_they_return(inner, instead):
    w, v, x = tensors()
    solver = ti.FixedPointIteration(steps=5)
    plain = Map(w, v).solve(x, solver=solver, gradient=inner)
    gradient = ti.WhenUnconverged(gradient=inner, instead=instead, above=1e-12)
    weighted = Map(w, v).solve(x, solver=solver, gradient=gradient)
    torch.testing.assert_close(weighted.aux["logits"], plain.aux["logits"])
    direct = [torch.autograd.grad(s.aux["logits"].sum(), v, retain_graph=True) for s in (weighted, plain)]
    close(*direct)


@pytest.mark.parametrize("transform", ["jacrev", "jacfwd", "hessian", "vmap", "grad of vmap"])
def test_transforms(transform):
    w, v, x = (t.detach() for t in tensors())
    f = Map(w, v)
    solved, by_hand = (lambda x: f.solve(x).aux["logits"]), (lambda x: unrolled(f, x)[1])
    func = torch.func
    apply = {
        "jacrev": func.jacrev,
        "jacfwd": func.jacfwd,
        "hessian": lambda g: func.hessian(lambda x: g(x).square().sum()),
        "vmap": lambda g: func.vmap(lambda s: g(s * x), in_dims=0),
        "grad of vmap": lambda g: func.grad(lambda s: func.vmap(lambda s: g(s * x))(s).square().sum()),
    }[transform]
    at = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64) if "vmap" in transform else x
    close((apply(solved)(at),), (apply(by_hand)(at),))


@pytest.mark.parametrize("problem", [ti.Root, ti.FixedPoint])
def test_roots_as_well(problem):
    w, v, x = tensors()
    f = Map(w, v)

    def residual(z, x):
        out, aux = f(z, x)
        return (z - out if problem is ti.Root else out), aux

    solution = ti.solve(problem(residual, has_aux=True), torch.zeros_like(x), x)
    got = torch.autograd.grad(loss(solution.value, solution.aux["logits"]), (x, w, v))
    close(got, torch.autograd.grad(loss(*unrolled(f, x)), (x, w, v)))


def test_an_iterate_that_is_not_the_last():
    """The plain iteration gets worse before its budget ends, so that the best iterate is returned."""
    rotate = torch.tensor([[0.0, -1.2], [1.2, 0.0]], dtype=torch.float64)

    def f(z):
        return z @ rotate + 1, z * 2

    solver = ti.FixedPointIteration(max_steps=6)
    with pytest.warns(ti.ConvergenceWarning):
        solution = ti.solve(ti.FixedPoint(f, has_aux=True), torch.ones(2, 2, dtype=torch.float64), solver=solver)
    torch.testing.assert_close(solution.aux, 2 * solution.value)


def test_it_goes_through_hooks_and_checkpoints():
    w, v, x = tensors()
    f = Map(w, v)
    expected = torch.autograd.grad(loss(*unrolled(f, x)), (x, w, v))

    def block(x):
        solution = f.solve(x)
        return solution.value, solution.aux["logits"]

    with saved_tensors_hooks(torch.clone, torch.clone):
        out = block(x)
    close(torch.autograd.grad(loss(*out), (x, w, v)), expected)
    close(torch.autograd.grad(loss(*checkpoint(block, x, use_reentrant=False)), (x, w, v)), expected)


def test_inside_another_equilibrium():
    w, v, x = tensors()
    f = Map(w, v)
    mix = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def outer(y, x):
        return 0.1 * f.solve(x + 0.1 * y).aux["logits"] @ mix

    def by_hand(y, x):
        return 0.1 * unrolled(f, x + 0.1 * y, 60)[1] @ mix

    y = torch.zeros_like(x)
    for _ in range(40):
        y = by_hand(y, x)
    found = ti.solve(ti.FixedPoint(outer), torch.zeros_like(x), x).value
    inputs = (x, w, v, mix)
    close(torch.autograd.grad(found.sin().sum(), inputs), torch.autograd.grad(y.sin().sum(), inputs), rtol=1e-6)


def test_nothing_is_kept_when_the_solution_has_gone():
    w, v, x = tensors()
    f = Map(w, v)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            solution = f.solve(x)
        kept = weakref.ref(solution.aux["logits"])
        gc.disable()
        try:
            del solution
            assert kept() is None
        finally:
            gc.enable()


def test_it_leaves_with_the_figures_and_the_graph():
    w, v, x = tensors()
    solution = Map(w, v).solve(x)
    assert solution.figures().aux is None
    assert not solution.__getstate__()["aux"]["logits"].requires_grad
    assert Map(w, v).solve(x, aux=False).aux is None


@pytest.mark.parametrize("out", [lambda z: z, lambda z: (z, z, z)])
def test_no_pair(out):
    with pytest.raises(ValueError, match=r"returns a pair \(state, aux\)"):
        ti.solve(ti.FixedPoint(lambda z: out(0.5 * z), has_aux=True), torch.ones(2, 2))


def test_compiled_solves_say_that_they_have_none():
    w, v, x = tensors()
    with pytest.warns(ti.CaptureWarning, match="has_aux"):
        solution = Map(w, v).solve(x, compile=True)
    assert solution.aux["logits"].shape == (4, 3)


def test_regularizers_and_diagnostics_take_such_a_map():
    w, v, x = tensors()
    f = Map(w, v)
    solution = f.solve(x)
    radius = ti.spectral_radius(solution.problem, solution.value, x)
    torch.testing.assert_close(radius, ti.spectral_radius(ti.FixedPoint(f.image), solution.value, x))
    torch.manual_seed(0)
    penalty = ti.regularizers.jacobian_frobenius(solution.problem, solution.value, x)
    torch.manual_seed(0)
    expected = ti.regularizers.jacobian_frobenius(ti.FixedPoint(f.image), solution.value, x)
    torch.testing.assert_close(penalty, expected)


class TestUnpack:
    """``f(*z)``: the entries of a tuple, list or named tuple as arguments of their own."""

    @pytest.mark.parametrize("kind", [tuple, list, ti.JointState])
    @pytest.mark.parametrize("returned", [tuple, list])
    def test_is_the_map_of_the_whole_state(self, kind, returned):
        w, _, x = tensors()

        def f(*given):
            parts, x = given[:-1], given[-1]
            out = [torch.tanh(part @ w + x) * (i + 1) / 3 for i, part in enumerate(reversed(parts))]
            return returned(out)

        def whole(z, x):
            return tuple(f(*z, x))

        zero = [torch.zeros_like(x) for _ in range(3)]
        z0 = kind(*zero) if kind is ti.JointState else kind(zero)
        solution = ti.solve(ti.FixedPoint(f, unpack=True), z0, x)
        expected = ti.solve(ti.FixedPoint(whole), tuple(zero), x)
        assert type(solution.value) is kind
        close(solution.value, expected.value)
        got, there = (torch.autograd.grad(sum(p.sin().sum() for p in s.value), (x, w)) for s in (solution, expected))
        close(got, there)

    def test_with_what_it_returns_beside(self):
        f = lambda a, b: ((0.5 * b + 1, 0.5 * a), a - b)  # noqa: E731
        solution = ti.solve(ti.FixedPoint(f, unpack=True, has_aux=True), (torch.ones(2, 2), torch.ones(2, 2)))
        torch.testing.assert_close(solution.aux, solution.value[0] - solution.value[1])

    def test_another_number_of_entries(self):
        with pytest.raises(ValueError, match="has the structure"):
            ti.solve(ti.FixedPoint(lambda a, b: (a, b, a), unpack=True), (torch.ones(2, 2), torch.ones(2, 2)))

    def test_a_state_without_entries(self):
        with pytest.raises(TypeError, match="leave out unpack"):
            ti.solve(ti.FixedPoint(lambda a: a, unpack=True), {"a": torch.ones(2, 2)})

    def test_compiled(self):
        a, b = torch.ones(3, 2), torch.ones(3, 4)
        f = lambda a, b: (0.5 * torch.tanh(b[:, :2]) + 1, 0.5 * torch.cat([a, a], 1))  # noqa: E731
        options = {"solver": ti.FixedPointIteration()}
        solution = ti.solve(ti.FixedPoint(f, unpack=True), (a, b), compile=True, **options)
        close(solution.value, ti.solve(ti.FixedPoint(f, unpack=True), (a, b), **options).value)


def test_beside_a_function_that_cuts_part_of_its_graph_off() -> None:
    x = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)

    def f(z: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        image = torch.tanh(0.3 * z + x) + 0 * x.detach()
        return image, image.square()

    solution = ti.solve(ti.FixedPoint(f, has_aux=True), torch.zeros_like(x), x)
    (g,) = torch.autograd.grad(solution.aux.sum(), x, retain_graph=True)
    (right,) = torch.autograd.grad(solution.value.square().sum(), x)
    torch.testing.assert_close(g, right)
