"""The backward pass differentiates what the forward pass saw, or autograd's own error says why it cannot."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cells import TanhCell, assert_all_close, loss_of, unrolled
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import torchimplicit as ti
from torchimplicit.nn import Equilibrium, VariationalDropout

F64 = torch.float64
DIM = 5
SOLVER = ti.Anderson(rtol=1e-13, max_steps=300)
IMPLICIT = ti.Implicit(linear_solver=ti.GMRES(rtol=1e-13))
ESTIMATORS = [
    IMPLICIT,
    ti.OneStep(),
    ti.NeumannPhantom(),
    ti.AdaptivePhantom(tolerance=1e-6),
    ti.UnbiasedNeumann(),
    ti.UnrolledPhantom(),
    ti.SharedInverse(),
]


def tensors() -> tuple[Tensor, Tensor]:
    """x ``[4, dim]`` and w ``[dim, dim]``."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, DIM, dtype=F64, generator=generator)
    w = torch.linalg.qr(torch.randn(DIM, DIM, dtype=F64, generator=generator)).Q
    return x.requires_grad_(), (0.5 * w).requires_grad_()


def solved(f: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    problem = options.pop("problem", ti.FixedPoint)
    options = {"solver": SOLVER, "gradient": IMPLICIT, **options}
    return ti.solve(problem(f), torch.zeros(4, DIM, dtype=F64), *args, **options).value


def iterated(f: Callable[..., Tensor], *args: Any) -> Tensor:
    z = torch.zeros(4, DIM, dtype=F64)
    for _ in range(100):
        z = f(z, *args)
    return z


def close(got: Any, expected: Any) -> None:
    assert_all_close(got, expected, rtol=1e-8, atol=1e-11)


class World:
    """Something that a function reads and that is no tensor."""

    gain = 1.0


@pytest.fixture
def world() -> World:
    return World()


# -- what is changed in between ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ESTIMATORS, ids=lambda g: type(g).__name__)
def test_a_buffer_that_is_filled_anew_is_an_error(gradient):
    x, w = tensors()
    gain = torch.ones((), dtype=F64)
    solver = ti.Broyden() if isinstance(gradient, ti.SharedInverse) else SOLVER
    z = solved(lambda z, x: torch.tanh(gain * (z @ w.T) + x), x, gradient=gradient, solver=solver)
    gain.fill_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.parametrize("gradient", ESTIMATORS, ids=lambda g: type(g).__name__)
def test_what_is_no_tensor_is_read_in_the_forward_pass(gradient, world):
    x, w = tensors()
    solver = ti.Broyden() if isinstance(gradient, ti.SharedInverse) else SOLVER

    def gradients(change: bool) -> Any:
        world.gain = 1.0
        torch.manual_seed(0)
        z = solved(lambda z, x: torch.tanh(world.gain * (z @ w.T) + x), x, gradient=gradient, solver=solver)
        world.gain = 0.3 if change else 1.0
        return torch.autograd.grad(z.sin().sum(), (x, w))

    close(gradients(True), gradients(False))


@pytest.mark.parametrize("problem", [ti.FixedPoint, ti.Root])
def test_derivatives_of_every_order_are_those_of_the_forward_pass(problem, world):
    x, w = tensors()

    def f(z: Tensor, x: Tensor) -> Tensor:
        image = torch.tanh(world.gain * (z @ w.T) + x)
        return image if problem is ti.FixedPoint else z - image

    def third(z: Tensor) -> Any:
        world.gain = 0.3
        (first,) = torch.autograd.grad(z.sin().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), w, create_graph=True)
        return first, second, *torch.autograd.grad(second.sin().sum(), (x, w))

    reference = third(iterated(lambda z, x: torch.tanh(z @ w.T + x), x))
    world.gain = 1.0
    close(third(solved(f, x, problem=problem)), reference)


def test_derivatives_of_a_minimum_are_those_of_the_forward_pass(world):
    x, w = tensors()

    def energy(z: Tensor, x: Tensor) -> Tensor:
        return ((z - x).square() + 0.1 * world.gain * z.pow(4)).sum(1) + (z @ w).square().sum(1)

    def second(change: bool) -> Any:
        world.gain = 1.0
        z = solved(energy, x, problem=ti.Minimum, solver=ti.LBFGS(rtol=1e-13), gradient=None)
        world.gain = 0.3 if change else 1.0
        (first,) = torch.autograd.grad(z.sin().sum(), x, create_graph=True)
        return first, *torch.autograd.grad(first.square().sum(), (x, w))

    close(second(True), second(False))


@pytest.mark.parametrize("gradient", [ti.Envelope(tolerance=10.0), ti.FixedInput(), ti.Implicit()])
def test_a_joint_problem_is_differentiated_as_it_was_solved(gradient, world):
    x, w = tensors()

    def f(z: Tensor, u: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(world.gain * (z @ w.T) + u + x)

    def gradients(change: bool) -> Any:
        world.gain = 1.0
        zero = torch.zeros(4, DIM, dtype=F64)
        problem = ti.JointInference(f, lambda z, u, x: (z - 1).square().sum(1) + u.square().sum(1), 0.2)
        state = ti.solve(problem, (zero, zero), x, solver=ti.Anderson(max_steps=2000), gradient=gradient).value
        world.gain = 0.3 if change else 1.0
        return torch.autograd.grad((state.z - 1).square().sum() + state.x.square().sum(), (x, w))

    close(gradients(True), gradients(False))


def test_equilibrium_propagation_says_that_the_energy_has_changed(world):
    x, _ = tensors()
    z = solved(
        lambda z, x: (world.gain * (z - x).square() + z.pow(4)).sum(1),
        x,
        problem=ti.Minimum,
        solver=ti.LBFGS(),
        gradient=ti.EquilibriumPropagation(),
    )
    world.gain = 0.5
    with pytest.raises(RuntimeError, match="does not give what it gave before"):
        z.sum().backward()


def test_rows_that_are_evaluated_apart_in_the_backward_pass_are_checked(world):
    """Those of a slow sample, after the others have left the adjoint solve."""
    _, w = tensors()
    x = torch.randn(40, DIM, dtype=F64, requires_grad=True)
    size = torch.logspace(-12, 0, 40, dtype=F64)[:, None]
    z = ti.solve(
        ti.FixedPoint(lambda z, x: torch.tanh(world.gain * (z @ w.T) * (1 + 0.8 * torch.sin(9 * x)) + x), rowwise=True),
        torch.zeros(40, DIM, dtype=F64),
        x,
    ).value
    (right,) = torch.autograd.grad((size * z).sum(), x, retain_graph=True)
    world.gain = 0.3
    try:
        (got,) = torch.autograd.grad((size * z).sum(), x)
    except RuntimeError as error:
        assert "does not give what it gave before" in str(error)  # noqa: PT017
    else:
        close([got], [right])


def test_a_batch_of_cotangents_sees_the_forward_pass(world):
    x, w = tensors()
    rows = torch.eye(4 * DIM, dtype=F64).reshape(-1, 4, DIM)

    def jacobian(gradient: Any, change: bool) -> Tensor:
        world.gain = 1.0
        z = solved(lambda z, x: torch.tanh(world.gain * (z @ w.T) + x), x, gradient=gradient)
        world.gain = 0.3 if change else 1.0
        return vmap(lambda v: torch.autograd.grad(z, x, v, retain_graph=True)[0])(rows)

    close([jacobian(IMPLICIT, True)], [jacobian(IMPLICIT, False)])
    with pytest.raises(RuntimeError, match="does not give what it gave before"):
        jacobian(ti.NeumannPhantom(), True)


def test_the_correction_of_iterates_sees_what_it_saw(world):
    x, w = tensors()

    def gradient(change: bool) -> Tensor:
        world.gain = 1.0
        f = ti.FixedPoint(lambda z, x: torch.tanh(world.gain * (z @ w.T) + x))
        solution = ti.solve(f, torch.zeros(4, DIM, dtype=F64), x, solver=ti.Anderson(keep_trajectory=True))
        loss = ti.regularizers.fixed_point_correction(solution, lambda z: z.sin().sum())
        world.gain = 0.3 if change else 1.0
        return torch.autograd.grad(loss, x)[0]

    close([gradient(True)], [gradient(False)])


def test_statistics_that_another_pass_moves():
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM)
            nn.init.orthogonal_(self.linear.weight, 0.5)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(self.norm(self.linear(z)) + x)

    cell = Cell().double().eval()
    x, _ = tensors()
    (expected,) = torch.autograd.grad(loss_of(iterated(cell, x)), cell.linear.weight)
    z = Equilibrium(cell, solver=SOLVER, gradient=IMPLICIT)(x)
    cell.train()
    cell(torch.randn(4, DIM, dtype=F64) * 3 + 1, x)
    cell.eval()
    try:
        (got,) = torch.autograd.grad(loss_of(z), cell.linear.weight)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:
        close([got], [expected])


def test_a_mode_that_is_left_before_the_backward_pass():
    class Dropping(TanhCell):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = VariationalDropout(0.5)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return self.dropout(super().forward(z, x))

    layer = Equilibrium(Dropping().double(), solver=SOLVER, gradient=IMPLICIT)
    x, _ = tensors()
    inputs = (x, *layer.parameters())

    def gradients(leave: bool) -> Any:
        torch.manual_seed(1)
        z = layer.train()(x)
        layer.train(not leave)
        return torch.autograd.grad(loss_of(z), inputs)

    close(gradients(True), gradients(False))


def test_a_default_dtype_that_is_left():
    x, w = tensors()
    f = lambda z, x: torch.tanh(z @ w.T @ torch.eye(DIM) + x)  # noqa: E731
    torch.set_default_dtype(F64)
    try:
        z, reference = solved(f, x), iterated(f, x)
    finally:
        torch.set_default_dtype(torch.float32)
    close(*(torch.autograd.grad(loss_of(v), (x, w)) for v in (z, reference)))


def test_a_function_mode_that_is_left():
    class Halved(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            return 0.5 * out if func is torch.tanh else out

    x, w = tensors()
    f = lambda z, x: torch.tanh(z @ w.T + x)  # noqa: E731
    with Halved():
        z, reference = solved(f, x), iterated(f, x)
    close(*(torch.autograd.grad(loss_of(v), (x, w)) for v in (z, reference)))


@pytest.mark.filterwarnings("ignore::torchimplicit.errors.SmoothnessWarning")
def test_a_kernel_that_was_chosen_around_the_forward_pass():
    """The one that has second derivatives."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, activation=torch.tanh).double()
    cell = lambda z, x: 0.2 * block(z) + x  # noqa: E731
    x = torch.randn(2, 3, 8, dtype=F64, requires_grad=True)
    z = torch.zeros_like(x)
    with sdpa_kernel(SDPBackend.MATH):
        for _ in range(60):
            z = cell(z, x)
        ours = ti.solve(ti.FixedPoint(cell), torch.zeros_like(x), x, solver=SOLVER, gradient=IMPLICIT).value
    results = []
    for value in (ours, z):
        (first,) = torch.autograd.grad(value.sin().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), x))
    close(*results)


def test_parameters_that_are_frozen_or_unfrozen_in_between():
    x, w = tensors()
    v = (0.3 * torch.eye(DIM, dtype=F64)).clone()
    f = lambda z, x: torch.tanh(z @ w.T + x @ v)  # noqa: E731
    expected = torch.autograd.grad(loss_of(iterated(f, x)), (x, w))
    z = solved(f, x)
    v.requires_grad_()
    close(torch.autograd.grad(loss_of(z), (x, w)), expected)
    assert v.grad is None
    v.requires_grad_(False)
    z = solved(f, x)
    w.requires_grad_(False)
    loss_of(z).backward()
    assert w.grad is None
    close([x.grad], expected[:1])


def test_a_hook_that_is_put_on_after_the_forward_pass_fires_once():
    x, w = tensors()
    f = lambda z, x: torch.tanh(z @ w.T + x)  # noqa: E731
    expected = torch.autograd.grad(loss_of(iterated(f, x)), w)
    z, fired = solved(f, x), []
    w.register_hook(lambda grad: fired.append(1) or 2 * grad)
    loss_of(z).backward()
    assert len(fired) == 1
    close([w.grad / 2], expected)


# -- functional_call ---------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Solves with its own method, written in one of the ``STYLES``."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        self.linear = nn.Linear(DIM, DIM)
        nn.init.orthogonal_(self.linear.weight, 0.5)

    def step(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)

    def forward(self, x: Tensor) -> Tensor:
        f, args = STYLES[self.style](self, x)
        return solved(f, *args)


class Callable_:
    def __init__(self, model: Model, x: Tensor) -> None:
        self.parts = {"model": [model], "x": x}

    def __call__(self, z: Tensor) -> Tensor:
        return self.parts["model"][0].step(z, self.parts["x"])

    def method(self, z: Tensor) -> Tensor:
        return self(z)


def inner_function(model: Model, x: Tensor) -> Callable[[Tensor], Tensor]:
    def inner(z: Tensor) -> Tensor:
        return model.step(z, x)

    return lambda z: inner(z)


STYLES: dict[str, Callable[[Model, Tensor], tuple[Any, tuple[Any, ...]]]] = {
    "method": lambda model, x: (model.step, (x,)),
    "lambda": lambda model, x: (lambda z: model.step(z, x), ()),
    "partial": lambda model, x: (functools.partial(model.step, x=x), ()),
    "partial of a lambda": lambda model, x: (functools.partial(lambda model, z: model.step(z, x), model), ()),
    "inner function": lambda model, x: (inner_function(model, x), ()),
    "default": lambda model, x: (lambda z, model=model: model.step(z, x), ()),
    "object": lambda model, x: (Callable_(model, x), ()),
    "method of an object": lambda model, x: (Callable_(model, x).method, ()),
}


def reference(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return iterated(lambda z: torch.tanh(z @ params["linear.weight"].T + params["linear.bias"] + x))


@pytest.mark.parametrize("base", ["trainable", "frozen", "meta"])
@pytest.mark.parametrize("style", STYLES)
class TestFunctionalCall:
    @pytest.fixture
    def model(self, style: str, base: str) -> Model:
        torch.manual_seed(0)
        return Model(style).double().requires_grad_(base != "frozen").to("meta" if base == "meta" else "cpu")

    @pytest.fixture
    def params(self) -> dict[str, Tensor]:
        torch.manual_seed(1)
        return {k: (0.8 * v.detach()).requires_grad_() for k, v in Model("method").double().named_parameters()}

    def test_two_orders(self, model, params):
        x, _ = tensors()
        results = []
        for z in (functional_call(model, params, (x,)), reference(params, x)):
            first = torch.autograd.grad(loss_of(z), params.values(), create_graph=True)
            results.append((*first, *torch.autograd.grad(sum(g.square().sum() for g in first), params.values())))
        close(*results)

    def test_function_transforms(self, model, params):
        x = tensors()[0].detach()
        plain = {k: v.detach() for k, v in params.items()}
        expected = torch.autograd.grad(loss_of(reference(params, x)), params.values())
        loss = lambda p: loss_of(functional_call(model, p, (x,)))  # noqa: E731
        close(torch.func.grad(loss)(plain).values(), expected)
        several = {k: torch.stack((v, 0.9 * v)) for k, v in plain.items()}
        close([g[0] for g in vmap(torch.func.grad(loss))(several).values()], expected)

    def test_an_ensemble_that_trains_by_backward(self, model, params):
        x = tensors()[0].detach()
        several = {k: torch.stack((v.detach(), 0.9 * v.detach())).requires_grad_() for k, v in params.items()}
        z = vmap(lambda p: functional_call(model, p, (x,)))(several)
        expected = torch.autograd.grad(loss_of(reference(params, x)), params.values())
        close([g[0] for g in torch.autograd.grad(loss_of(z[0]), several.values())], expected)

    def test_an_inner_step_of_learning(self, model, params):
        x, _ = tensors()
        results = []
        for call in (lambda p: functional_call(model, p, (x,)), lambda p: reference(p, x)):
            steps = torch.autograd.grad(loss_of(call(params)), params.values(), create_graph=True)
            moved = {k: v - 0.1 * step for (k, v), step in zip(params.items(), steps, strict=True)}
            results.append(torch.autograd.grad(call(moved).cos().sum(), params.values()))
        close(*results)


def test_an_ensemble_of_stacked_modules():
    models = [Model("lambda").double() for _ in range(3)]
    params, buffers = stack_module_state(models)
    base = Model("lambda").double().to("meta")
    x = tensors()[0].detach()
    z = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(params, buffers)
    loss_of(z).backward()
    for i, model in enumerate(models):
        expected = torch.autograd.grad(loss_of(model(x)), model.parameters())
        close([params[name].grad[i] for name, _ in model.named_parameters()], expected)


def test_a_module_that_cannot_be_found_behind_a_function_is_an_error_under_transforms():
    x = tensors()[0].detach()
    model = Model("lambda").double().requires_grad_(False)
    registry: Iterator[Model] = iter(lambda: model, None)  # opaque to whoever looks for modules

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return solved(lambda z: next(registry).step(z, x))

    hidden, params = Hidden(), {f"model.{k}": 0.8 * v for k, v in model.named_parameters()}
    with pytest.raises(RuntimeError, match="no longer uses a captured tensor"):
        torch.func.grad(lambda p: loss_of(functional_call(hidden, p, (x,))))(params)


# -- what it costs -----------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.calls = nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM), 0
        nn.init.orthogonal_(self.linear.weight, 0.3)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return 0.3 * torch.tanh(self.norm(self.linear(z))) + x


@pytest.mark.parametrize("gradient", [ti.Implicit(), ti.OneStep(), ti.NeumannPhantom()])
def test_one_evaluation_serves_the_whole_backward_pass(gradient):
    """It is made in the forward pass, where something requires grad; batch statistics see no more evaluations."""
    cell = Counting().double()
    x, _ = tensors()
    layer = Equilibrium(cell, gradient=gradient)
    z = layer(x)
    assert cell.calls == layer.solution.evaluations + 1 == int(cell.norm.num_batches_tracked)
    loss_of(z).backward()
    assert cell.calls == layer.solution.evaluations + 1
    cell.calls = 0
    with torch.no_grad():
        layer(x)
    assert cell.calls == layer.solution.evaluations
    cell.calls = 0
    layer.requires_grad_(False)(x.detach())
    assert cell.calls == layer.solution.evaluations


def test_second_derivatives_take_no_further_evaluation():
    calls = []
    x, w = tensors()
    z = solved(lambda z, x: calls.append(1) or torch.tanh(z @ w.T + x), x)
    count = len(calls)
    (first,) = torch.autograd.grad(z.sin().sum(), x, create_graph=True)
    torch.autograd.grad(first.square().sum(), (x, w))
    assert len(calls) == count


def test_what_is_saved_is_freed_by_the_backward_pass():
    saved: list[weakref.ref[Tensor]] = []

    class Saving(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            mine = torch.zeros(3)
            ctx.save_for_backward(mine)
            saved.append(weakref.ref(mine))
            return z.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g

    x, w = tensors()
    problem = ti.FixedPoint(lambda z, x: torch.tanh(Saving.apply(z) @ w.T + x))
    gc.disable()
    try:
        solution = ti.solve(problem, torch.zeros(4, DIM, dtype=F64), x)
        loss = loss_of(solution.value)
        assert sum(reference() is not None for reference in saved) == 1
        loss.backward(retain_graph=True)
        assert sum(reference() is not None for reference in saved) == 1
        loss.backward()
        assert not any(reference() is not None for reference in saved)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    finally:
        gc.enable()


# -- hooks on saved tensors --------------------------------------------------------------------------------------------


def joint(x: Tensor, w: Tensor) -> Tensor:
    zero = torch.zeros(4, DIM, dtype=F64)
    problem = ti.JointInference(
        lambda z, u, x: torch.tanh(z @ w.T + u + x), lambda z, u, x: (z - 1).square().sum(1) + u.square().sum(1), 0.2
    )
    return ti.solve(problem, (zero, zero), x, solver=ti.Anderson(max_steps=2000)).value.x


LAYERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "fixed point": lambda x, w: solved(lambda z, x: torch.tanh(z @ w.T + x), x),
    "Newton": lambda x, w: solved(lambda z, x: torch.tanh(z @ w.T + x), x, solver=ti.NewtonKrylov()),
    "root": lambda x, w: solved(lambda z, x: z - torch.tanh(z @ w.T + x), x, problem=ti.Root, solver=None),
    "minimum": lambda x, w: solved(
        lambda z, x: ((z - x).square() + z.pow(4)).sum(1) + (z @ w).square().sum(1), x, problem=ti.Minimum, solver=None
    ),
    "joint": joint,
    "phantom": lambda x, w: solved(lambda z, x: torch.tanh(z @ w.T + x), x, gradient=ti.NeumannPhantom()),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_saved_tensors_go_through_hooks_once(layer):
    x, w = tensors()
    packed, unpacked = [], []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t.clone()

    def unpack(t: Tensor) -> Tensor:
        unpacked.append(t)
        return t

    expected = torch.autograd.grad(loss_of(layer(x, w)), (x, w))
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        z = layer(x, w)
    close(torch.autograd.grad(loss_of(z), (x, w)), expected)
    assert 0 < len(unpacked) <= len(packed) < 60, "nothing of the solver's own is saved through hooks"


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_a_checkpoint_solves_again_once(layer):
    x, w = tensors()
    runs = []

    def block(x: Tensor) -> Tensor:
        runs.append(1)
        return layer(x, w)

    expected = torch.autograd.grad(loss_of(layer(x, w)), (x, w))
    close(torch.autograd.grad(loss_of(checkpoint(block, x, use_reentrant=False)), (x, w)), expected)
    assert len(runs) == 2


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "phantom"])
def test_a_gradient_inside_a_checkpoint(name):
    """Forces inside a checkpointed block, as interatomic potentials have them."""
    x, w = tensors()
    layer = LAYERS[name]

    def forces(x: Tensor) -> Tensor:
        return torch.autograd.grad(layer(x, w).sin().sum(), x, create_graph=True)[0]

    (expected,) = torch.autograd.grad(forces(x).square().sum(), w)
    (got,) = torch.autograd.grad(checkpoint(forces, x, use_reentrant=False).square().sum(), w)
    close([got], [expected])


def test_nothing_that_the_cell_saves_stays_on_the_device():
    x, w = tensors()
    with torch.autograd.graph.save_on_cpu():
        z = solved(lambda z, x: torch.tanh(z @ w.T + x), x)
    (first,) = torch.autograd.grad(z.sin().sum(), x, create_graph=True)
    got = torch.autograd.grad(first.square().sum(), (x, w))
    (first,) = torch.autograd.grad(iterated(lambda z, x: torch.tanh(z @ w.T + x), x).sin().sum(), x, create_graph=True)
    close(got, torch.autograd.grad(first.square().sum(), (x, w)))


def test_the_layer_against_unrolling_after_all_that():
    layer = Equilibrium(TanhCell().double())
    x, _ = tensors()
    inputs = (x, *layer.parameters())
    close(
        torch.autograd.grad(loss_of(layer(x)), inputs),
        torch.autograd.grad(loss_of(unrolled(layer.cell, x)), inputs),
    )
