import copy
import io
import pickle
import weakref

import pytest
import torch
from cells import TanhCell, assert_all_close, gradients, loss_of, second_derivatives, unrolled
from torch import nn

import torchimplicit as ti
from torchimplicit.nn import Equilibrium


def layer_and_input(**options):
    layer = Equilibrium(TanhCell().double(), **options)
    return layer, torch.randn(4, 5, dtype=torch.float64, requires_grad=True)


def saved_and_loaded(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


class TestDerivatives:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("rowwise", [True, False])
    def test_first_and_second_are_those_of_unrolling(self, training, rowwise):
        layer, x = layer_and_input(rowwise=rowwise)
        layer.train(training)
        inputs = (x, *layer.parameters())
        assert_all_close(gradients(layer(x), inputs), gradients(unrolled(layer.cell, x), inputs))
        expected = second_derivatives(unrolled(layer.cell, x), x, inputs)
        assert_all_close(second_derivatives(layer(x), x, inputs), expected)

    def test_the_input_alone_when_all_parameters_are_frozen(self):
        layer, x = layer_and_input()
        layer.requires_grad_(False)
        assert_all_close(gradients(layer(x), (x,)), gradients(unrolled(layer.cell, x), (x,)))

    def test_one_parameter_when_others_are_frozen(self):
        layer, x = layer_and_input()
        layer.cell.recurrent.weight.requires_grad_(False)
        layer(x.detach()).sum().backward()
        assert layer.cell.recurrent.weight.grad is None
        expected = torch.autograd.grad(unrolled(layer.cell, x.detach()).sum(), layer.cell.input.weight)
        assert_all_close((layer.cell.input.weight.grad,), expected)

    def test_without_grad_the_value_is_the_same_and_carries_none(self):
        layer, x = layer_and_input()
        expected = layer(x)
        with torch.no_grad():
            z = layer(x)
        assert not z.requires_grad
        torch.testing.assert_close(z, expected.detach())

    def test_an_explicit_initial_state_is_used(self):
        layer, x = layer_and_input()
        z = layer(x)
        layer(x, z0=z.detach())
        assert layer.solution.steps.eq(0).all()

    def test_unrolled_reaches_a_learned_initial_state(self):
        layer, x = layer_and_input(gradient=ti.Unrolled(), solver=ti.FixedPointIteration(max_steps=3, rtol=1.0))
        z0 = torch.zeros_like(x).requires_grad_()
        (grad,) = torch.autograd.grad(layer(x, z0=z0).sum(), z0)
        assert grad.abs().max() > 0


class TestStructures:
    def test_a_list_of_scales_of_different_shapes(self):
        class TwoScales(nn.Module):
            def __init__(self):
                super().__init__()
                self.fine = nn.Conv2d(2, 2, 3, padding=1)
                self.coarse = nn.Linear(3, 3)

            def initial_state(self, x):
                return [torch.zeros_like(x["image"]), x["image"].new_zeros(len(x["image"]), 3)]

            def forward(self, z, x):
                fine = 0.3 * torch.tanh(self.fine(z[0]) + x["image"] + z[1].mean(dim=1)[:, None, None, None])
                mean = z[0].mean(dim=(1, 2, 3))[:, None]
                return [fine, 0.3 * torch.tanh(self.coarse(z[1]) + x["scale"][0] + mean)]

        cell = TwoScales().double()
        x = {"image": torch.randn(3, 2, 4, 4).double().requires_grad_(), "scale": (torch.ones(3, 1).double(), "a word")}
        inputs = (x["image"], *cell.parameters())
        state = cell.initial_state(x)
        for _ in range(100):
            state = cell(state, x)
        expected = torch.autograd.grad(loss_of(state[0]) + loss_of(state[1]), inputs)
        for rowwise in (False, True):
            z = Equilibrium(cell, rowwise=rowwise)(x)
            assert isinstance(z, list)
            assert_all_close(torch.autograd.grad(loss_of(z[0]) + loss_of(z[1]), inputs), expected)

    def test_a_dict(self):
        class Pair(nn.Module):
            def forward(self, z, x):
                wide = torch.cat([z["a"] + x, x], dim=1)
                return {"a": 0.5 * torch.cos(z["b"].sum(dim=1, keepdim=True)) + x, "b": 0.5 * torch.sin(wide)}

        x = torch.randn(3, 1).double()
        z = Equilibrium(Pair())(x, z0={"a": x, "b": torch.zeros(3, 2).double()})
        torch.testing.assert_close(Pair()(z, x), z)

    def test_one_system(self):
        class Graph(nn.Module):
            def forward(self, z, x):
                return 0.5 * torch.tanh(x @ z)

        layer = Equilibrium(Graph(), batched=False)
        layer(torch.randn(4, 4).double(), z0=torch.randn(4).double())
        assert layer.solution.converged.shape == ()

    def test_float32_rowwise_shrinks_the_work(self):
        layer = Equilibrium(TanhCell(), rowwise=True)
        x = torch.randn(4, 5)
        hard_to_reach = torch.cat([layer(x)[:3].detach(), 100 * torch.ones(1, 5)])
        layer(x, z0=hard_to_reach)
        assert layer.solution.evaluations < layer.solution.steps.max()


class Gated(nn.Module):
    """``z = tanh(W z + x) * gate``, and what it is read out to."""

    def __init__(self, has_aux=False):
        super().__init__()
        self.mix = nn.Linear(5, 5)
        self.read = nn.Linear(5, 3)
        self.has_aux = has_aux
        with torch.no_grad():
            self.mix.weight.mul_(0.4)

    def forward(self, z, x, gate, scale=1.0):
        out = torch.tanh(self.mix(z) + x) * gate * scale
        return (out, {"logits": self.read(z), "step": 1}) if self.has_aux else out


class TwoParts(nn.Module):
    """Two states of different shapes, taken one by one."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(5, 3), nn.Linear(3, 5)

    def initial_state(self, x, gate):
        return x.new_zeros(len(x), 5), x.new_zeros(len(x), 3)

    def forward(self, fine, coarse, x, gate):
        return [torch.tanh(self.up(coarse) + x), 0.3 * torch.tanh(self.down(fine) * gate)]


class TestInputs:
    @pytest.mark.parametrize("scale", [(), (0.5,)])
    @pytest.mark.parametrize("rowwise", [True, False])
    def test_any_number(self, rowwise, scale):
        cell = Gated().double()
        layer = Equilibrium(cell, rowwise=rowwise)
        x, gate = (torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
        z = torch.zeros_like(x)
        for _ in range(300):
            z = cell(z, x, gate, *scale)
        found = layer(x, gate, *scale)
        torch.testing.assert_close(found, z)
        inputs = (x, gate, cell.mix.weight)
        assert_all_close(gradients(found, inputs), gradients(z, inputs))

    def test_none_but_a_state(self):
        cell = nn.Sequential(nn.Linear(5, 5), nn.Tanh()).double()
        cell[0].weight.data.mul_(0.3)
        z = Equilibrium(cell)(z0=torch.zeros(4, 5, dtype=torch.float64))
        torch.testing.assert_close(z, cell(z))

    def test_dropout_and_norms_take_them_all(self):
        class Cell(nn.Module):
            def __init__(self):
                super().__init__()
                self.mix, self.drop = ti.nn.spectral_norm(nn.Linear(5, 5), bound=0.5), ti.nn.VariationalDropout(0.5)

            def forward(self, z, x, shift):
                return torch.tanh(self.drop(self.mix(z)) + x) + shift

        layer, shift = Equilibrium(Cell().double(), rowwise=True), torch.ones(4, 5, dtype=torch.float64)
        layer(torch.randn(4, 5, dtype=torch.float64), shift).sum().backward()
        assert layer.solution.converged.all()
        assert layer.cell.mix.parametrizations.weight.original.grad.abs().max() > 0

    def test_entries_of_a_state_taken_one_by_one(self):
        cell = TwoParts().double()
        x, gate = (torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
        layer = Equilibrium(cell, unpack=True)
        fine, coarse = cell.initial_state(x, gate[:, :3])
        for _ in range(300):
            fine, coarse = cell(fine, coarse, x, gate[:, :3])
        found = layer(x, gate[:, :3])
        assert isinstance(found, tuple)
        inputs = (x, gate, *cell.parameters())
        loss = lambda z: torch.cat([part.sin() for part in z], dim=1).square().sum()  # noqa: E731
        assert_all_close(torch.autograd.grad(loss(found), inputs), torch.autograd.grad(loss((fine, coarse)), inputs))

    def test_a_tensor_has_no_entries_to_take(self):
        with pytest.raises(TypeError, match="unpack=True calls f"):
            Equilibrium(TanhCell(), unpack=True)(torch.zeros(4, 5))

    def test_a_state_by_position_raises(self):
        layer, x = layer_and_input()
        with pytest.raises(TypeError, match=r"called with 2 inputs, but TanhCell.forward takes 1 .*layer\(x, z0=z\)"):
            layer(x, torch.zeros_like(x))

    def test_too_few(self):
        with pytest.raises(TypeError, match=r"called with 1 inputs, but Gated.forward takes 2 to 3"):
            Equilibrium(Gated())(torch.zeros(4, 5))

    def test_an_initial_state_gets_them_all(self):
        with pytest.raises(TypeError, match=r"TwoParts.initial_state takes 2"):
            Equilibrium(TwoParts(), unpack=True)(torch.zeros(4, 5))

    @pytest.mark.parametrize("module", [nn.Linear(8, 8), nn.Conv1d(8, 8, 1), nn.LayerNorm(8)])
    def test_a_state_of_another_shape_than_the_input(self, module):
        class Cell(nn.Module):
            def __init__(self):
                super().__init__()
                self.mix, self.inject = module, nn.Linear(5, 8)

            def forward(self, z, x):
                z = z[..., None] if isinstance(self.mix, nn.Conv1d) else z
                return torch.tanh(0.1 * self.mix(z).reshape(-1, 8) + self.inject(x))

        with pytest.raises(ValueError, match=r"began at zeros like the first input, shape \(4, 5\).*initial_state"):
            Equilibrium(Cell())(torch.zeros(4, 5))
        assert Equilibrium(Cell())(torch.zeros(4, 5), z0=torch.zeros(4, 8)).shape == (4, 8)

    def test_a_state_that_grows(self):
        class Cell(nn.Module):
            def forward(self, z, x):
                return torch.cat([x, z], dim=1)

        with pytest.raises(ValueError, match=r"returned shape \(4, 10\) for it"):
            Equilibrium(Cell())(torch.zeros(4, 5))

    def test_an_error_of_the_cells_own_stays_what_it_is(self):
        class Cell(nn.Module):
            def forward(self, z, x):
                raise RuntimeError("the shape of things to come")

        with pytest.raises(RuntimeError, match="things to come"):
            Equilibrium(Cell())(torch.zeros(4, 5))


class TestAuxiliary:
    @pytest.mark.parametrize("training", [True, False])
    def test_comes_out_beside_the_state_with_its_gradient(self, training):
        layer = Equilibrium(Gated(has_aux=True).double(), has_aux=True).train(training)
        x, gate = (torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
        _, aux = layer(x, gate)
        expected = torch.zeros_like(x)
        for _ in range(300):
            expected, read = layer.cell(expected, x, gate)
        assert aux["step"] == 1
        torch.testing.assert_close(aux["logits"], read["logits"])
        inputs = (x, gate, *layer.parameters())
        assert_all_close(gradients(aux["logits"], inputs[:4]), gradients(read["logits"], inputs[:4]))
        assert layer.solution.aux["logits"].grad_fn is None
        torch.testing.assert_close(layer.solution.aux["logits"], aux["logits"].detach())
        assert layer.solve(x, gate).aux["logits"].requires_grad

    def test_not_with_a_refreshed_state(self):
        with pytest.raises(ValueError, match="has_aux=True"):
            Equilibrium(TanhCell(), has_aux=True, warm_start=ti.nn.WarmStart(refresh=1))


class TestSolvers:
    def test_evaluation_has_its_own(self):
        layer, x = layer_and_input(solver=ti.Anderson(rtol=1e-2), eval_solver=ti.Anderson(rtol=1e-9))
        layer(x)
        loose = layer.solution.residual.max()
        layer.eval()(x)
        assert loose > 1e-6 > 1e-9 >= layer.solution.residual.max()

    def test_a_call_has_its_own(self):
        layer, x = layer_and_input(eval_solver=ti.FixedPointIteration(steps=1))
        layer.eval()(x, solver=ti.FixedPointIteration(steps=3), gradient=ti.Unrolled())
        assert layer.solution.steps.eq(3).all()
        assert layer.solution.evaluations == 3
        layer(x)
        assert layer.solution.steps.eq(1).all()

    def test_a_gradient_for_a_call_must_suit_the_warm_start(self):
        layer, x = layer_and_input(warm_start=True)
        with pytest.raises(ValueError, match="Unrolled differentiates the solver's steps"):
            layer(x, gradient=ti.Unrolled())

    def test_a_name_for_a_solver_of_a_call(self):
        layer, x = layer_and_input()
        with pytest.raises(TypeError, match="solver must be a Solver"):
            layer(x, solver="anderson")


class TestBookkeeping:
    def test_the_solution_is_kept_detached_and_the_adjoint_report_follows(self):
        layer, x = layer_and_input()
        assert layer.solution is None
        z = layer(x)
        assert layer.solution.converged.all()
        assert not layer.solution.value.requires_grad
        assert layer.solution.adjoint is None
        z.sum().backward()
        assert layer.solution.adjoint.converged.all()

    def test_a_kept_trajectory_holds_no_graph(self):
        layer, x = layer_and_input(solver=ti.Anderson(keep_trajectory=True), gradient=ti.Unrolled())
        layer(x)
        assert layer.solution.trajectory
        assert not any(z.requires_grad for z in layer.solution.trajectory)

    def test_solve_gives_the_whole_solution_with_gradients(self):
        layer, x = layer_and_input()
        solution = layer.solve(x)
        assert solution.value.requires_grad
        torch.testing.assert_close(solution.value, layer(x))

    def test_repr_shows_what_is_not_the_default(self):
        assert "Anderson" in repr(Equilibrium(TanhCell(), solver=ti.Anderson(), rowwise=True))
        assert "rowwise=True" in repr(Equilibrium(TanhCell(), rowwise=True))
        assert "gradient" not in repr(Equilibrium(TanhCell()))


class TestCopies:
    @pytest.mark.parametrize("used", [True, False])
    @pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded, lambda m: pickle.loads(pickle.dumps(m))])
    def test_give_the_same(self, copied, used):
        layer, x = layer_and_input(warm_start=True, solver=ti.Broyden())
        if used:
            layer(x).sum().backward()
        other = copied(layer)
        assert other.solution is None
        assert_all_close(gradients(other(x), (x,)), gradients(unrolled(layer.cell, x), (x,)))
        assert other.cell.recurrent.weight is not layer.cell.recurrent.weight

    def test_state_dict_holds_the_cell_alone(self):
        layer, x = layer_and_input(warm_start=True)
        layer(x).sum().backward()
        assert set(layer.state_dict()) == {f"cell.{name}" for name in layer.cell.state_dict()}
        other, _ = layer_and_input()
        other.load_state_dict(layer.state_dict())
        torch.testing.assert_close(other(x), layer(x))


class TestErrors:
    def test_a_function_for_a_cell(self):
        with pytest.raises(
            TypeError, match=r"nn\.Module called as cell\(z, \*inputs\).*function.*torchimplicit\.solve"
        ):
            Equilibrium(lambda z, x: z)

    def test_a_class_for_a_cell(self):
        with pytest.raises(TypeError, match="the class TanhCell"):
            Equilibrium(TanhCell)

    def test_a_name_for_a_solver(self):
        with pytest.raises(TypeError, match=r"solver must be a Solver or None, for example solver=Anderson\(\)"):
            Equilibrium(TanhCell(), solver="anderson")

    def test_a_class_for_a_gradient(self):
        with pytest.raises(TypeError, match="gradient must be a Gradient"):
            Equilibrium(TanhCell(), gradient=ti.Implicit)

    def test_a_number_for_a_warm_start(self):
        with pytest.raises(TypeError, match="warm_start must be True, False or a WarmStart"):
            Equilibrium(TanhCell(), warm_start=3)

    def test_no_initial_state(self):
        with pytest.raises(ValueError, match=r"pass z0=..., or give the cell a method initial_state"):
            Equilibrium(TanhCell())({"a": torch.zeros(1, 5)})

    def test_a_bad_row_is_named(self):
        layer, x = layer_and_input()
        bad = x.detach().clone()
        bad[2] = torch.nan
        with pytest.raises(ti.SolveError, match=r"\(2\)"):
            layer(bad)


def test_a_solution_hook_sees_the_problem_as_it_was_solved():
    layer, x = layer_and_input()
    seen = []
    handle = layer.register_solution_hook(lambda owner, solution: seen.append((owner, solution)))
    layer(x)
    ((owner, solution),) = seen
    assert owner is layer
    ti.regularizers.jacobian_frobenius(solution.problem, solution.value, *solution.args).backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert layer.solution is not None
    assert layer.solution.problem is None, "what is kept must not hold the graph"
    handle.remove()
    layer(x)
    assert len(seen) == 1


@pytest.mark.alone
@pytest.mark.parametrize("gradient", [None, ti.OneStep(), ti.UnrolledPhantom()])
def test_the_start_is_let_go_when_the_solver_has_left_it(gradient):
    class Cell(TanhCell):
        def initial_state(self, x):
            start = torch.ones_like(x)
            starts.append(weakref.ref(start.untyped_storage()))
            return start

        def forward(self, z, x):
            alive.append(starts[-1]() is not None)
            return super().forward(z, x)

    starts, alive = [], []
    layer = Equilibrium(Cell().double(), solver=ti.FixedPointIteration(), gradient=gradient)
    layer(torch.randn(4, 5, dtype=torch.float64))
    assert alive[0]
    assert not any(alive[3:])
