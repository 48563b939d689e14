"""The interface of mldft's networks, on a small one: its energy, its gradient through the minimum, and its weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import torchimplicit as ti
from torchimplicit.models.orbital_free.mldft import MldftFunctional, written_back

N = 6


class Net(nn.Module):
    """Called with a sample, as those of mldft."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(N, 8, dtype=torch.float64)
        self.outer = nn.Linear(8, 1, dtype=torch.float64)

    def forward(self, sample) -> tuple[Tensor, Tensor]:
        p = sample.coeffs
        return self.outer(torch.tanh(self.inner(p))) + 0.5 * (p @ p), torch.zeros_like(p)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def sample() -> SimpleNamespace:
    draw = torch.Generator().manual_seed(1)
    root = torch.randn(N, N, generator=draw, dtype=torch.float64)
    return SimpleNamespace(
        coeffs=torch.full((N,), 0.5, dtype=torch.float64),
        coulomb_matrix=root @ root.T,
        nuclear_attraction_vector=-torch.rand(N, generator=draw, dtype=torch.float64),
        dual_basis_integrals=torch.rand(N, generator=draw, dtype=torch.float64) + 0.5,
        n_electron=3,
    )


def test_the_gradient_through_its_minimum(net, sample) -> None:
    """Against differences of minima; the sample is left as it was."""
    functional = MldftFunctional(net=net)
    target = torch.linspace(0.2, 0.8, N, dtype=torch.float64)

    def loss() -> Tensor:
        solution = ti.solve(functional.problem(sample), sample.coeffs, solver=ti.LBFGS(rtol=0.0, atol=1e-11))
        assert bool(solution.converged)
        assert float(sample.dual_basis_integrals @ solution.value) == pytest.approx(3.0)
        return (solution.value - target).square().sum()

    (exact,) = torch.autograd.grad(loss(), net.outer.weight)
    direction, values = torch.ones_like(exact), []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            net.outer.weight.add_(step * direction)
            values.append(float(loss()))
            net.outer.weight.sub_(step * direction)
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(float((exact * direction).sum()), rel=1e-5)
    assert bool((sample.coeffs == 0.5).all())


def test_fine_tuning_lowers_the_loss_and_is_written_back(net, sample) -> None:
    functional = MldftFunctional(net=net)
    checkpoint = {"epoch": 3, "state_dict": {"loss.weight": torch.ones(1)}}
    checkpoint["state_dict"] |= {f"net.{name}": tensor.clone() for name, tensor in net.state_dict().items()}
    target = torch.linspace(0.2, 0.8, N, dtype=torch.float64)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-2)
    losses = []
    for _ in range(10):
        solution = ti.solve(functional.problem(sample), sample.coeffs)
        loss = (solution.value - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    found = written_back(checkpoint, net)
    assert found["epoch"] == 3
    torch.testing.assert_close(found["state_dict"]["net.outer.weight"], net.outer.weight.detach())
    assert not torch.equal(checkpoint["state_dict"]["net.outer.weight"], net.outer.weight)


def test_a_network_of_the_total_energy_has_nothing_beside_it(net, sample) -> None:
    p = sample.coeffs
    alone = MldftFunctional(net=net, target_key="tot")(p, sample)
    torch.testing.assert_close(alone, net(sample)[0].sum())
    whole = MldftFunctional(net=net)(p, sample)
    more = 0.5 * p @ sample.coulomb_matrix @ p + sample.nuclear_attraction_vector @ p
    torch.testing.assert_close(whole, alone + more)


def test_what_has_no_minimum_is_refused(net, sample) -> None:
    with pytest.raises(ValueError, match="target_key"):
        MldftFunctional(net=net, target_key="kin")
    with pytest.raises(ValueError, match="evaluation mode"):
        MldftFunctional(net=Net())

    class Slopes(Net):
        def forward(self, sample):
            return *super().forward(sample), sample.coeffs

    with pytest.raises(ValueError, match="not variational"):
        MldftFunctional(net=Slopes().eval())(sample.coeffs, sample)
    with pytest.raises(ValueError, match="other names"):
        written_back({"state_dict": {}}, net)
