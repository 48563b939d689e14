import copy

import pytest
import torch
from cells import TanhCell, assert_all_close, gradients
from torch import nn

import torchimplicit as ti
from torchimplicit.nn import Equilibrium, VariationalDropout


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
