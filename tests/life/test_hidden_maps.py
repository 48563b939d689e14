"""Maps that hide something: what they depend on, their randomness, the memory that they return. Threads, inference
mode, sparse tensors, pickles, exports."""

from __future__ import annotations

import io
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cells import TanhCell, assert_all_close, loss_of, unrolled
from torch import Tensor, nn

import torchimplicit as ti
from torchimplicit.nn import Equilibrium, VariationalDropout

F64 = torch.float64
A = torch.tensor([[0.3, 0.2], [0.1, 0.4]], dtype=F64)


@pytest.fixture
def b() -> Tensor:
    return torch.randn(3, 2, dtype=F64, requires_grad=True)


def zeros() -> Tensor:
    return torch.zeros(3, 2, dtype=F64)


# -- what autograd does not see ----------------------------------------------------------------------------------------


def without_gradient(z: Tensor) -> Tensor:
    with torch.no_grad():
        return z @ A.T


HIDDEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "no_grad": lambda z, b: without_gradient(z) + b,
    "detach": lambda z, b: z.detach() @ A.T + b,
    "data": lambda z, b: z.data @ A.T + b,
    "all of it": lambda z, b: without_gradient(z) + b.detach(),
    "foreign": lambda z, b: torch.tensor((z @ A.T).tolist(), dtype=F64) + b,
}


@pytest.mark.parametrize("gradient", [ti.Implicit(), ti.NeumannPhantom(), ti.AdaptivePhantom()])
@pytest.mark.parametrize("f", HIDDEN.values(), ids=HIDDEN)
def test_a_map_whose_state_is_cut_off_is_refused(f, gradient, b):
    with pytest.raises(ValueError, match="autograd does not see how the output"):
        ti.solve(ti.FixedPoint(f), zeros(), b, gradient=gradient).value.sum().backward()


def test_newton_refuses_it_too(b):
    with pytest.raises(ValueError, match="autograd does not see"):
        ti.solve(ti.Root(lambda z, b: z.detach() @ A.T + b - z.detach()), zeros(), b)


def test_an_estimator_without_the_jacobian_takes_a_state_that_is_cut_off(b):
    solution = ti.solve(ti.FixedPoint(HIDDEN["detach"]), zeros(), b, gradient=ti.OneStep())
    torch.testing.assert_close(torch.autograd.grad(solution.value.sum(), b)[0], torch.ones_like(b))
    solution = ti.solve(ti.FixedPoint(HIDDEN["all of it"]), zeros(), b, gradient=ti.OneStep())
    with pytest.raises(ValueError, match="autograd does not see"):
        solution.value.sum().backward()


def test_a_part_of_a_tree_that_is_cut_off(b):
    start = {"a": zeros(), "c": zeros()}
    f = lambda s, b: {"a": 0.3 * s["a"] + b, "c": 0.2 * s["a"].detach() + b}  # noqa: E731
    for gradient in (ti.Implicit(), ti.Unrolled(), ti.UnrolledPhantom()):  # in the forward pass already
        with pytest.raises(ValueError, match=r"2 of the 4 numbers of the output \(in \['c'\]\)"):
            ti.solve(ti.FixedPoint(f), start, b, gradient=gradient)


@pytest.mark.parametrize("gradient", [ti.Implicit(), ti.Unrolled(), ti.UnrolledPhantom()])
@pytest.mark.parametrize("name", ["no_grad", "detach", "data", "foreign"])
def test_it_is_refused_in_the_forward_pass_where_it_is_to_be_differentiated(name, gradient, b):
    problem = ti.FixedPoint(HIDDEN[name])
    with pytest.raises(ValueError, match="autograd does not see how the output"):
        ti.solve(problem, zeros(), b, gradient=gradient)
    assert ti.solve(problem, zeros(), b.detach(), gradient=gradient).converged.all()


class OfItsOwn(nn.Module):
    """A function that nothing is known of from before."""

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.forward = f


PARTLY_HIDDEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "no_grad": lambda z, b: torch.tanh(z @ A.to(z)) + 0.05 * without_gradient(z.double()).to(z) + b,
    "detach": lambda z, b: torch.tanh(z @ A.to(z)) * z.detach().cos() + b,
    "data": lambda z, b: torch.relu(z @ A.to(z)) + 0.02 * z.data + b,
    "item": lambda z, b: torch.tanh(z @ A.to(z)) * (1 + 0.1 * z.square().mean().item()) + b,
    "foreign": lambda z, b: torch.tanh(z @ A.to(z)) + torch.as_tensor(0.05 * z.detach().numpy()) + b,
}


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("f", PARTLY_HIDDEN.values(), ids=PARTLY_HIDDEN)
def test_a_part_of_a_map_that_is_cut_off_is_warned_of_once(f, dtype, b):
    b = b.detach().to(dtype).requires_grad_()
    own = OfItsOwn(f)
    job = lambda: ti.solve(ti.FixedPoint(own), zeros().to(dtype), b)  # noqa: E731
    with pytest.warns(UserWarning, match="hides part of its dependence on the state from autograd"):
        job()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        job()


def with_a_detached_shift(z: Tensor, b: Tensor) -> Tensor:
    """The usual softmax, which does not depend on the shift."""
    y = z @ A.to(z)
    e = (y - y.detach().amax(dim=-1, keepdim=True)).exp()
    return e / e.sum(dim=-1, keepdim=True) + b


SEEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a shift": with_a_detached_shift,
    "a constant": lambda z, b: torch.relu(z @ A.to(z)) + 0.1 * b.detach(),
    "a parameter": lambda z, b: torch.tanh(z @ A.to(z).detach()) + b,
    "nothing in the end": lambda z, b: torch.relu(z @ A.to(z)) + 0 * z.detach() + b,
    "a solve": lambda z, b: ti.solve(ti.FixedPoint(lambda y, z: 0.3 * y.sin() + z), z, 0.2 * z).value + b,
}


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("f", SEEN.values(), ids=SEEN)
def test_what_is_cut_off_without_an_effect_is_not(f, dtype, b):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        b = b.detach().to(dtype).requires_grad_()
        ti.solve(ti.FixedPoint(OfItsOwn(f)), zeros().to(dtype), b).value.sum().backward()


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_a_part_of_a_tree_that_is_constant(dtype):
    """However many numbers it has, for the dtype to count."""
    b = torch.randn(2, 300, dtype=dtype, requires_grad=True)
    start = {"a": torch.zeros_like(b), "c": torch.zeros_like(b)}
    f = lambda s, b: {"a": 0.5 * s["a"], "c": 0.25 * b}  # noqa: E731
    ti.solve(ti.FixedPoint(f), start, b).value["c"].sum().backward()
    torch.testing.assert_close(b.grad, torch.full_like(b, 0.25))


@pytest.mark.parametrize("f", [lambda z, b: 2 * b, lambda z, b: 2 * b + 0 * z, lambda z, b: torch.ones_like(b)])
def test_a_map_that_does_not_depend_on_its_state_is_fine(f, b):
    value = ti.solve(ti.FixedPoint(f), zeros(), b).value
    (got,) = torch.autograd.grad(value.sum(), b)
    torch.testing.assert_close(got, torch.full_like(b, float(f(zeros(), b).requires_grad) * 2))


# -- randomness --------------------------------------------------------------------------------------------------------


def told(job: Callable[[], Any]) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        job()
    return sum("different values at one point" in str(w.message) for w in caught)


def test_dropout_is_noticed_once_for_each_function():
    weight = nn.Parameter(A.clone())
    maps = {
        True: lambda z: torch.tanh(nn.functional.dropout(z, 0.5) @ weight.T + 1),
        False: lambda z: torch.tanh(nn.functional.dropout(z @ weight.T, 0.5) + 1),
    }

    def job(grad: bool) -> None:
        with torch.set_grad_enabled(grad):
            ti.solve(ti.FixedPoint(maps[grad]), zeros(), solver=ti.FixedPointIteration(rtol=0.3))

    for grad in maps:
        assert sum(told(lambda grad=grad: job(grad)) for _ in range(5)) == 1


def test_randomness_of_other_sources_is_noticed():
    own, calls, weight = torch.Generator().manual_seed(0), [], nn.Parameter(A.clone())

    def counting(z: Tensor) -> Tensor:
        calls.append(1)
        return torch.tanh(z @ weight.T + 1) + 1 / len(calls)

    def drawing(z: Tensor) -> Tensor:
        return torch.tanh(z @ weight.T + 1) + 0.01 * torch.randn(3, 2, dtype=F64, generator=own)

    for f in (counting, drawing):
        job = lambda f=f: ti.solve(ti.FixedPoint(f), zeros(), solver=ti.FixedPointIteration(rtol=0.3))  # noqa: E731
        assert [told(job), told(job)] == [1, 0]


@pytest.mark.parametrize("norm", [False, True])
def test_a_map_that_is_not_random_says_nothing(norm):
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm, self.dropout = nn.Linear(5, 5), nn.BatchNorm1d(5), VariationalDropout(0.3)
            nn.init.orthogonal_(self.linear.weight, 0.3)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            h = self.linear(z)
            return self.dropout(0.3 * torch.tanh(self.norm(h) if norm else h) + x)

    layer, x = Equilibrium(Cell().double()), torch.randn(8, 5, dtype=F64)
    assert told(lambda: [layer(x).sum().backward() for _ in range(2)]) == 0


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [ti.Implicit(), ti.Unrolled(), ti.UnrolledPhantom(steps=1, damping=1.0)])
@pytest.mark.parametrize("grad", [False, True])
def test_the_value_shares_no_memory_with_what_the_map_returned(gradient, grad):
    p = nn.Parameter(torch.ones(2, 3))
    x = torch.ones(2, 3)
    maps = [(lambda z, x: x, (x,)), (lambda z, x: x[:], (x,)), (lambda z: x, ()), (lambda z: p, ())]
    with torch.set_grad_enabled(grad):
        for f, args in maps:
            value = ti.solve(ti.FixedPoint(f), torch.zeros(2, 3), *args, gradient=gradient).value
            with torch.no_grad():
                value.detach().add_(1)
            assert torch.equal(x, torch.ones(2, 3)) and torch.equal(p, torch.ones(2, 3))  # noqa: PT018


def test_leaves_reach_the_function_contiguous():
    def f(s: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        z = torch.view_as_complex(s["complex"])
        flat = s["real"].view(-1)
        return {"real": 0.3 * flat.view(4, 3) + x, "complex": torch.view_as_real(0.3 * z + 1j)}

    start = {"real": torch.zeros(4, 3, dtype=F64), "complex": torch.zeros(4, 2, 2, dtype=F64)}
    x = torch.ones(4, 3, dtype=F64, requires_grad=True)
    value = ti.solve(ti.FixedPoint(f), start, x).value
    torch.testing.assert_close(value["real"], x / 0.7)
    value["real"].sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / 0.7))
    turned = lambda z: 0.5 * (z.view(-1).view(4, 3).T.contiguous().T) + 1  # noqa: E731
    torch.testing.assert_close(ti.solve(ti.FixedPoint(turned), torch.zeros(4, 3)).value, torch.full((4, 3), 2.0))


def test_a_solution_pickles(b):
    solution = ti.solve(ti.FixedPoint(lambda z, b: 0.5 * z + b), zeros(), b)
    stream = io.BytesIO()
    torch.save(solution, stream)
    for again in (pickle.loads(pickle.dumps(solution)), torch.load(io.BytesIO(stream.getvalue()), weights_only=False)):
        assert torch.equal(again.value, solution.value)
        assert not again.value.requires_grad
        assert again.converged.all()
        assert again.problem is None
    assert solution.problem is not None


# -- inference mode ----------------------------------------------------------------------------------------------------


def inner(z: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(z @ A.T + x)


PROBLEMS: dict[str, Callable[[Tensor], Any]] = {
    "Anderson": lambda x: ti.solve(ti.FixedPoint(inner), zeros(), x).value,
    "Newton": lambda x: ti.solve(ti.FixedPoint(inner), zeros(), x, solver=ti.NewtonKrylov()).value,
    "root": lambda x: ti.solve(ti.Root(lambda z, x: z - inner(z, x)), zeros(), x).value,
    "captured": lambda x: ti.solve(ti.Root(lambda z: z - inner(z, x)), zeros()).value,
    "minimum": lambda x: ti.solve(ti.Minimum(lambda z, x: (z - x).square().sum(1)), zeros(), x).value,
    "joint": lambda x: (
        ti.solve(
            ti.JointInference(inner, lambda z, u: (z - 1).square().sum(1) + u.square().sum(1), 0.2),
            (zeros(), x),
            solver=ti.Anderson(max_steps=1000),
        ).value.x
    ),
    "radius": lambda x: ti.spectral_radius(ti.FixedPoint(inner), zeros(), x),
}


@pytest.mark.parametrize("job", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("made", ["inside", "outside"])
def test_inference_mode_finds_what_no_grad_finds(job, made, b):
    with torch.no_grad():
        expected = job(b)
    x = b.detach().clone()
    with torch.inference_mode():
        got = job(x.clone() if made == "inside" else x)
    torch.testing.assert_close(got.clone(), expected)


@pytest.mark.parametrize("samples", [None, 4])
def test_a_warm_start_made_in_inference_mode_serves_outside(samples):
    layer = Equilibrium(TanhCell().double(), warm_start=ti.nn.WarmStart(samples=samples))
    x = torch.randn(4, 5, dtype=F64)
    index = None if samples is None else torch.arange(4)
    with torch.inference_mode():
        layer(x, index=index)
    loss_of(layer(x, index=index)).backward()
    expected = torch.autograd.grad(loss_of(unrolled(layer.cell, x)), layer.parameters())
    assert_all_close([p.grad for p in layer.parameters()], expected, rtol=1e-6, atol=1e-8)


# -- threads -----------------------------------------------------------------------------------------------------------


def in_threads(work: Callable[[int], None], count: int = 4) -> None:
    errors: list[Exception] = []

    def run(i: int) -> None:
        try:
            work(i)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]


@pytest.mark.parametrize("shared", [False, True])
def test_threads_that_train(shared):
    one = TanhCell().double()

    def work(i: int) -> None:
        cell = one if shared else TanhCell().double()
        x = torch.randn(3, 5, dtype=F64, generator=torch.Generator().manual_seed(i)).requires_grad_()
        inputs = (x, *cell.parameters())
        expected = torch.autograd.grad(loss_of(unrolled(cell, x, steps=80)), inputs)
        for step in range(10):
            weight = cell.recurrent.weight * 1.0  # captured, with a history
            f = lambda z, x, w=weight: torch.tanh(z @ w.T + cell.recurrent.bias + cell.input(x))  # noqa: E731
            value = ti.solve(ti.FixedPoint(f), torch.zeros_like(x), x).value
            got = torch.autograd.grad(loss_of(value), inputs, create_graph=step % 2 == 0)
            assert_all_close(got, expected, rtol=1e-6, atol=1e-8)

    in_threads(work)
    assert torch._dynamo.eval_frame._stance.stance == "default"


# -- tensors and modules of other kinds --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.parametrize("passed", [False, True])
@pytest.mark.parametrize("gradient", [ti.Implicit(), ti.NeumannPhantom(steps=80, damping=1.0)])
def test_sparse_tensors(layout, passed, gradient):
    dense = 0.3 * torch.randn(6, 6, dtype=F64) * (torch.rand(6, 6) > 0.5)
    x = torch.randn(6, 3, dtype=F64, requires_grad=True)
    leaf = dense.clone().requires_grad_()
    z = torch.zeros(6, 3, dtype=F64)
    for _ in range(200):
        z = torch.tanh(leaf @ z + x)
    expected = torch.autograd.grad(loss_of(z), (leaf, x))
    sparse = (dense.to_sparse() if layout == "coo" else dense.to_sparse_csr()).requires_grad_()
    f = (lambda z, x, s: torch.tanh(s @ z + x)) if passed else (lambda z, x: torch.tanh(sparse @ z + x))
    args = (x, sparse) if passed else (x,)
    value = ti.solve(ti.FixedPoint(f, batched=False), torch.zeros(6, 3, dtype=F64), *args, gradient=gradient).value
    of_sparse, of_x = torch.autograd.grad(loss_of(value), (sparse, x))
    where = dense != 0
    assert_all_close((of_sparse.to_dense()[where], of_x), (expected[0][where], expected[1]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("problem", [ti.FixedPoint, ti.Root, ti.Minimum])
@pytest.mark.parametrize("solver", [None, ti.NewtonKrylov()])
def test_states_without_numbers(shape, problem, solver):
    f = (lambda z, x: (z - x).square().sum(1)) if problem is ti.Minimum else (lambda z, x: 0.5 * z + x)
    x = torch.zeros(shape, requires_grad=True)
    value = ti.solve(problem(f), torch.zeros(shape), x, solver=solver).value
    value.sum().backward()
    assert value.shape == x.grad.shape == shape


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_is_refused_in_words(strict):
    with pytest.raises(Exception, match="no fixed graph to export"):
        torch.export.export(nn.Sequential(Equilibrium(TanhCell())), (torch.randn(3, 5),), strict=strict)


# -- constraints that say nothing, or too much -------------------------------------------------------------------------


def constrained(weight: Tensor, total: float = 1.0) -> Tensor:
    problem = ti.Minimum(lambda z: (z - 1).square().sum(1), ti.LinearEquality(weight, total))
    return ti.solve(problem, torch.zeros(2, 3, dtype=weight.dtype)).value


def test_weights_of_a_constraint():
    with pytest.raises(ValueError, match="weight is zero"):
        constrained(torch.zeros(3))
    with pytest.raises(ValueError, match="weight is zero"):
        constrained(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
    with pytest.raises(ValueError, match="weight holds NaN"):
        constrained(torch.tensor([1.0, torch.nan, 1.0]))
    with pytest.raises(ValueError, match="total holds NaN"):
        constrained(torch.ones(3), torch.inf)
    for size, dtype in ((1e-30, torch.float32), (1e30, torch.float32), (1e-200, F64)):
        value = constrained(torch.full((3,), size, dtype=dtype), size)
        torch.testing.assert_close(value, torch.full((2, 3), 1 / 3, dtype=dtype))


def test_bounds_in_the_wrong_order():
    one, zero, nan = torch.ones(3), torch.zeros(3), torch.full((3,), torch.nan)
    for low, high in ((one, zero), (1.0, zero), (one, 0.0), ({"a": one}, {"a": zero}), (nan, one)):
        with pytest.raises(ValueError, match="low must not exceed high"):
            ti.Box(low, high)
    ti.Box(zero, one)
    ti.Box(-torch.inf, one)
    for radius in (-one, nan):
        with pytest.raises(ValueError, match="must not be negative"):
            ti.L2Ball(radius)


def test_one_dimension_that_is_eliminated():
    total = torch.tensor(2.0, dtype=F64, requires_grad=True)
    problem = ti.Minimum(
        lambda z: z.square().sum(1), ti.LinearEquality(torch.ones(1, dtype=F64), total), eliminate=True
    )
    for solver in (None, ti.NewtonKrylov()):
        value = ti.solve(problem, torch.zeros(2, 1, dtype=F64), solver=solver).value
        torch.testing.assert_close(value, torch.full_like(value, 2.0))
        torch.testing.assert_close(torch.autograd.grad(value.sum(), total)[0], torch.tensor(2.0, dtype=F64))
