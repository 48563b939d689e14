import copy

import pytest
import torch
from cells import TanhCell, assert_all_close, gradients
from torch import nn

import torchimplicit as ti
from torchimplicit.nn import Equilibrium, VariationalDropout, dropout_masks, per_solve


class DroppingCell(TanhCell):
    def __init__(self, p=0.5):
        super().__init__()
        self.dropout = VariationalDropout(p)

    def forward(self, z, x):
        return self.dropout(super().forward(z, x))


def masked_unrolling(cell, mask, x, steps=200):
    plain = TanhCell.forward
    z = torch.zeros_like(x)
    for _ in range(steps):
        z = plain(cell, z, x) * mask
    return z


def mask_of(z):
    """Where the last operation of the cell is the dropout, the state shows its mask."""
    return torch.where(z == 0, 0.0, 2.0).to(z.dtype).detach()


@pytest.fixture
def x():
    return torch.randn(6, 5, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("rowwise", [False, True])
def test_one_mask_a_solve_and_the_same_in_the_backward_pass(x, rowwise):
    layer = Equilibrium(DroppingCell().double(), rowwise=rowwise)
    inputs = (x, *layer.parameters())
    z = layer(x)
    assert layer.solution.converged.all()
    assert 0 < (z == 0).double().mean() < 1
    assert_all_close(gradients(z, inputs), gradients(masked_unrolling(layer.cell, mask_of(z), x), inputs))


def test_masks_differ_between_solves_and_two_backward_passes_each_use_their_own(x):
    layer = Equilibrium(DroppingCell().double())
    first, second = layer(x), layer(x)
    assert not torch.equal(mask_of(first), mask_of(second))
    for z in (first, second):
        assert_all_close(gradients(z, (x,)), gradients(masked_unrolling(layer.cell, mask_of(z), x), (x,)))


def test_a_seed_gives_the_same_mask(x):
    layer = Equilibrium(DroppingCell().double())
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(layer(x))
    assert torch.equal(*results)


def test_eval_mode_drops_nothing(x):
    layer = Equilibrium(DroppingCell().double()).eval()
    torch.testing.assert_close(layer(x), Equilibrium(copy_without_dropout(layer.cell))(x))


def copy_without_dropout(cell):
    plain = TanhCell().double()
    plain.load_state_dict(cell.state_dict())
    return plain


def test_the_mean_is_kept():
    class Injection(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = VariationalDropout(0.3)

        def forward(self, z, x):
            return self.dropout(x) + 0 * z

    z = Equilibrium(Injection())(torch.ones(100, 100))
    assert z.mean() == pytest.approx(1, abs=0.03)
    assert z.unique().tolist() == pytest.approx([0, 1 / 0.7])


def test_spatial_masks_drop_whole_channels():
    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = VariationalDropout(0.5, spatial=True)

        def forward(self, z, x):
            return self.dropout(0.1 * z + x)

    z = Equilibrium(Images())(torch.ones(4, 8, 3, 3))
    assert z.flatten(2).amax(2).eq(z.flatten(2).amin(2)).all()
    assert z[:, :, 0, 0].eq(0).any()


def test_a_module_used_twice_has_one_mask(x):
    class Twice(DroppingCell):
        def forward(self, z, x):
            return self.dropout(TanhCell.forward(self, self.dropout(z), x))

    layer = Equilibrium(Twice().double())
    z = layer(x)
    assert layer.solution.converged.all()
    torch.testing.assert_close(z, TanhCell.forward(layer.cell, z * mask_of(z), x) * mask_of(z))


@pytest.mark.parametrize("rowwise", [False, True])
def test_an_inner_equilibrium_keeps_its_mask_through_the_outer_solve(x, rowwise):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Equilibrium(DroppingCell().double(), rowwise=rowwise)
            self.outer = VariationalDropout(0.2)

        def forward(self, z, x):
            return self.outer(0.3 * self.inner(z + x))

    layer = Equilibrium(Outer(), rowwise=rowwise)
    z = layer(x)
    assert layer.solution.converged.all()
    assert all(m.held is None and not m.drawing for m in layer.modules() if isinstance(m, VariationalDropout))

    def same_masks(x):
        torch.manual_seed(1)
        return layer(x)

    assert not torch.equal(z, same_masks(x))
    assert torch.autograd.gradcheck(same_masks, x[:2].detach().requires_grad_())


def test_gradcheck_of_first_and_second_derivatives(x):
    layer = Equilibrium(DroppingCell().double())

    def same_mask(x):
        torch.manual_seed(1)
        return layer(x)

    small = x[:2].detach().requires_grad_()
    assert torch.autograd.gradcheck(same_mask, small)
    assert torch.autograd.gradgradcheck(same_mask, small)


def test_outside_an_equilibrium_it_raises_in_training_only():
    dropout = VariationalDropout()
    with pytest.raises(RuntimeError, match=r"must run inside torchimplicit\.nn\.Equilibrium"):
        dropout(torch.ones(2, 2))
    assert torch.equal(dropout.eval()(torch.ones(2, 2)), torch.ones(2, 2))


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_a_share_out_of_range(p):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        VariationalDropout(p)


def test_spatial_dropout_of_a_vector():
    class Bad(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = VariationalDropout(spatial=True)

        def forward(self, z, x):
            return self.dropout(z.sum())

    with pytest.raises(ValueError, match=r"\[batch, channels, \.\.\.\]"):
        Equilibrium(Bad())(torch.ones(2, 2))


def test_nothing_is_held_after_an_error(x):
    layer = Equilibrium(DroppingCell().double())
    with pytest.raises(ti.SolveError):
        layer(x * torch.nan)
    assert layer.cell.dropout.held is None
    assert copy.deepcopy(layer).cell.dropout.held is None


class Injecting(nn.Module):
    """A map whose fixed point shows the mask of ``dropout``."""

    def __init__(self, dropout):
        super().__init__()
        self.dropout = dropout

    def forward(self, z, x):
        return self.dropout(x) + 0 * z


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize(
    ("shape", "shared", "constant"),
    [
        ((4, 9, 7), 1, (1,)),  # channels of [B, L, C]
        ((4, 9, 7), 2, (2,)),  # tokens
        ((4, 9, 7), -1, (2,)),
        ((4, 5, 6, 7), (1, 2), (1, 2)),  # channels of [B, H, W, C]
        ((4, 5, 6, 7), [1, -2], (1, 2)),
        ((4, 5, 6, 7), 1, (1,)),  # pixels of [B, C, H, W]
        ((4, 7, 9), (), ()),
        ((4, 9), 1, (1,)),  # whole samples
    ],
)
def test_masks_are_shared_along_the_dimensions_named_and_no_others(shape, shared, constant, rowwise):
    x = torch.ones(shape)
    z = Equilibrium(Injecting(VariationalDropout(0.5, shared=shared)), rowwise=rowwise)(x)
    kept = z.ne(0)
    assert torch.equal(z, 2.0 * kept)
    for d in range(len(shape)):
        same = kept.eq(kept.narrow(d, 0, 1)).all()
        assert bool(same) == (d in constant), d


def test_a_shared_mask_has_the_gradient_of_the_masked_map(x):
    class Sequences(DroppingCell):
        def __init__(self):
            super().__init__()
            self.dropout = VariationalDropout(0.5, shared=1)

    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    layer = Equilibrium(Sequences().double(), rowwise=True)
    inputs = (x, *layer.parameters())
    z = layer(x)
    assert_all_close(gradients(z, inputs), gradients(masked_unrolling(layer.cell, mask_of(z), x), inputs))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shared": 1.0}, TypeError, "must be a dimension or several"),
        ({"shared": (1, True)}, TypeError, "must be a dimension or several"),
        ({"shared": 1, "spatial": True}, ValueError, "not both"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        VariationalDropout(**options)


@pytest.mark.parametrize("shared", [0, -3, 3, -4, (1, 5)])
def test_a_dimension_that_is_not_there_or_is_the_batch(shared):
    with pytest.raises(ValueError, match="must be one of its dimensions other than the batch"):
        Equilibrium(Injecting(VariationalDropout(shared=shared)))(torch.ones(2, 3, 4))


def test_a_place_of_another_shape_gets_no_broadcast_mask():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = VariationalDropout()

        def forward(self, z, x):
            return self.dropout(x) + self.dropout(z[:1])

    with pytest.raises(RuntimeError, match="Uses with different shapes need a module each"):
        Equilibrium(Twice())(torch.ones(3, 2))


def test_masks_of_a_block_hold_to_its_end_and_no_longer(x):
    cell = DroppingCell().double()
    with dropout_masks(cell):
        z = torch.zeros_like(x)
        for _ in range(200):
            z = cell(z, x)
        mask = mask_of(z)
        assert torch.equal(mask_of(cell(z, x)), mask)
    inputs = (x, *cell.parameters())
    assert_all_close(gradients(z, inputs), gradients(masked_unrolling(cell, mask, x), inputs))
    with dropout_masks(cell):
        assert not torch.equal(mask_of(cell(z, x)), mask)
    with pytest.raises(RuntimeError, match="dropout_masks"):
        cell(z, x)


def test_an_equilibrium_takes_the_masks_of_the_block_around_it(x):
    layer = Equilibrium(DroppingCell().double())
    inputs = (x, *layer.parameters())
    with dropout_masks(layer):
        z = layer(x)
        assert torch.equal(mask_of(layer(x + 1)), mask_of(z))
    assert layer.cell.dropout.held is None
    assert not layer.cell.dropout.drawing
    assert_all_close(gradients(z, inputs), gradients(masked_unrolling(layer.cell, mask_of(z), x), inputs))
    assert not torch.equal(mask_of(layer(x)), mask_of(z))


def test_blocks_inside_each_other_have_the_masks_of_the_outer_one():
    dropout, x = VariationalDropout(), torch.ones(20, 20)
    with dropout_masks(dropout):
        with dropout_masks(dropout):
            first = dropout(x)
        assert torch.equal(dropout(x), first)
    assert dropout.held is None


def test_a_block_that_fails_leaves_no_mask():
    model = nn.Sequential(VariationalDropout(), nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), dropout_masks(model):
        model(torch.ones(2, 2))
    assert model[0].held is None
    assert not model[0].drawing


GRADIENTS = [
    ti.Implicit(),
    ti.Unrolled(),
    ti.UnrolledPhantom(steps=150, damping=1.0),
    ti.NeumannPhantom(steps=150, damping=1.0),
]


@pytest.mark.parametrize("gradient", GRADIENTS, ids=lambda g: type(g).__name__)
def test_a_map_for_solve_keeps_its_masks_in_the_backward_pass(x, gradient):
    cell = DroppingCell().double()
    solver = ti.FixedPointIteration(max_steps=300, rtol=1e-13)
    solution = ti.solve(ti.FixedPoint(per_solve(cell)), torch.zeros_like(x), x, solver=solver, gradient=gradient)
    z, inputs = solution.value, (x, *cell.parameters())
    assert 0 < (z == 0).double().mean() < 1
    assert cell.dropout.held is None
    expected = gradients(masked_unrolling(cell, mask_of(z), x), inputs)
    assert_all_close(gradients(z, inputs), expected, rtol=1e-6, atol=1e-8)


def test_every_map_for_solve_draws_masks_of_its_own(x):
    cell = DroppingCell().double()
    first, second = per_solve(cell), per_solve(cell)
    z = torch.zeros_like(x)
    assert torch.equal(first(z, x), first(z, x))
    assert not torch.equal(first(z, x), second(z, x))
    assert torch.equal(per_solve(cell.eval())(z, x), cell(z, x))


def test_a_map_for_solve_whose_batch_shrinks_says_so(x):
    x = torch.cat([x, 1e-3 * x])
    cell = DroppingCell().double()
    problem = ti.FixedPoint(per_solve(cell), rowwise=True)
    with pytest.raises(ValueError, match="captures no tensor that carries the batch"):
        ti.solve(problem, torch.zeros_like(x), x, solver=ti.FixedPointIteration(check_every=1, max_steps=200))


def test_masks_drawn_under_a_transform_are_refused_and_those_from_before_serve_in_it():
    cell = DroppingCell().double()
    x = torch.randn(3, 5, dtype=torch.float64)

    def loss(x, function):
        return function(torch.zeros_like(x), x).sum()

    with pytest.raises(RuntimeError, match="Call the map once before"):
        torch.func.grad(loss)(x, per_solve(cell))
    assert cell.dropout.held is None
    function = per_solve(cell)
    function(x, x)
    wanted = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(wanted, function), wanted)
    torch.testing.assert_close(torch.func.grad(loss)(x, function), expected)
