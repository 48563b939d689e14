"""A message-passing network of coefficients as a functional, and as a potential."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import torchimplicit as ti
from torchimplicit.models.orbital_free import (
    CoefficientNetwork,
    Molecule,
    NetworkConfig,
    OrbitalFree,
    OrbitalFreeConfig,
)
from torchimplicit.models.orbital_free.network import Graph
from torchimplicit.models.orbital_free.second import hessian, mixed

pytest.importorskip("scipy")

from torchimplicit.models.orbital_free.basis import DensityBasis
from torchimplicit.models.orbital_free.on_grid import OnGrid

F64 = torch.float64
PLACES = torch.tensor([[0.0, 0.0, 0.0], [1.4, 1.1, 0.2], [-1.3, 1.2, 0.4]], dtype=F64)


def made(places: Tensor = PLACES, charges: tuple[int, ...] = (8, 1, 1)) -> Molecule:
    """Atoms with two s, two p and one d shell each, whose overlaps are taken on a grid; their energies are made up."""
    atoms = len(charges)
    angular = torch.tensor([0, 0, 1, 1, 2]).repeat(atoms)
    exponent = torch.tensor([1.1, 0.4, 0.9, 0.5, 0.7], dtype=F64).repeat(atoms)
    atom = torch.arange(atoms).repeat_interleave(5)
    basis = DensityBasis(centres=places, atom=atom, angular=angular, exponent=exponent)
    axis = torch.linspace(-5.5, 5.5, 12, dtype=F64)
    points = torch.cartesian_prod(axis, axis, axis) + places.mean(dim=0)
    values, gradients = basis.evaluate(points)
    quadrature = torch.full((len(points),), 1.0, dtype=F64)
    overlap = values.T @ values
    n = values.shape[1]
    weight, isotropic = basis.integrals(), basis.spread(angular == 0)
    guess = torch.where(isotropic, 0.5, 0.0).to(F64)
    electrons = weight @ guess
    draw = torch.Generator().manual_seed(3)
    return Molecule(
        name="made",
        charges=torch.tensor(charges),
        positions=places,
        electrons=electrons,
        overlap=overlap,
        coulomb=4 * overlap + torch.eye(n, dtype=F64),
        weight=weight,
        external=-weight,
        atom=basis.spread(atom),
        angular=basis.spread(angular),
        shell=basis.spread(basis.numbers()),
        basis=OnGrid.of(values, gradients),
        quadrature=quadrature,
        points=points,
        reference=guess + 0.02 * torch.randn(n, generator=draw, dtype=F64) * isotropic,
        guess=guess,
        **{k: torch.tensor(-1.0, dtype=F64) for k in ("energy", "repulsion", "kinetic", "exchange_correlation")},
    )


@pytest.fixture(scope="module")
def water() -> Molecule:
    return made()


def network(molecule: Molecule, size: float = 0.3, **more: int) -> CoefficientNetwork:
    """With weights in its last layers too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = CoefficientNetwork(NetworkConfig.of([molecule], width=8, channels=2, radial=4, **more))
        for parameter in found.parameters():
            with torch.no_grad():
                parameter.add_(size * torch.randn_like(parameter))
    return found


def functional(molecule: Molecule, at: str) -> OrbitalFree:
    config = OrbitalFreeConfig(hidden=0, network=NetworkConfig.of([molecule], width=8, channels=2, radial=4))
    found = OrbitalFree(replace(config, network_at=at))
    found.network.load_state_dict(network(molecule, 0.1).state_dict())
    return found


def turned(molecule: Molecule) -> tuple[Molecule, Tensor]:
    """The molecule in another orientation, and how coefficients turn."""
    draw = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=draw, dtype=F64)).Q
    rotation = rotation * torch.linalg.det(rotation)
    other = made(molecule.positions @ rotation.T)
    turn = torch.zeros(molecule.size, molecule.size, dtype=F64)
    points = torch.randn(40, 3, generator=draw, dtype=F64)
    for angular, exponent in ((0, 0.8), (1, 0.8), (2, 0.8)):
        basis = DensityBasis(
            centres=torch.zeros(1, 3, dtype=F64),
            atom=torch.zeros(1, dtype=torch.long),
            angular=torch.tensor([angular]),
            exponent=torch.tensor([exponent], dtype=F64),
        )
        block = torch.linalg.lstsq(basis.values(points @ rotation.T), basis.values(points)).solution
        for start in (molecule.angular == angular).nonzero()[:: 2 * angular + 1, 0]:
            part = slice(int(start), int(start) + 2 * angular + 1)
            turn[part, part] = block
    return replace(other, overlap=turn @ molecule.overlap @ turn.T), turn  # the grid has not turned


def test_its_energy_does_not_turn_and_its_slope_does(water) -> None:
    other, turn = turned(water)
    energy = network(water)
    p = water.guess + 0.1 * torch.randn(water.size, generator=torch.Generator().manual_seed(2), dtype=F64)
    slopes = []
    for molecule, q in ((water, p), (other, turn @ p)):
        q = q.clone().requires_grad_()
        value = energy(q, molecule)
        slopes.append((value.detach(), *torch.autograd.grad(value, q)))
    torch.testing.assert_close(slopes[0][0], slopes[1][0], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(turn @ slopes[0][1], slopes[1][1], rtol=1e-6, atol=1e-8)


def test_it_begins_at_zero(water) -> None:
    fresh = CoefficientNetwork(NetworkConfig.of([water]))
    assert float(fresh(water.guess, water)) == 0
    assert sum(p.numel() for p in fresh.parameters()) < 200_000


def test_batches_are_the_molecules_one_by_one(water) -> None:
    other, energy = made(1.2 * PLACES), network(water)
    ps = torch.stack([water.guess, water.reference])
    graph, rows = energy.known(water)
    second, others = energy.known(other)
    joined = Graph.joined([graph, graph, second])
    found = energy.of_rows(torch.cat([rows(ps).flatten(0, 1), others(other.guess)]), joined)
    alone = [energy(water.guess, water), energy(water.reference, water), energy(other.guess, other)]
    torch.testing.assert_close(found.view(3, 3).sum(dim=1), torch.stack(alone))


def test_what_is_remembered_outlives_a_transform_that_asks_first(water) -> None:
    """A molecule whose first energy is taken within torch.func, and the next ones elsewhere."""
    energy, first = network(water), made()
    second = torch.func.jacrev(torch.func.grad(lambda p: energy(p, first)), chunk_size=5)
    columns = second(first.guess)
    torch.testing.assert_close(second(first.guess), columns)
    p = first.guess.clone().requires_grad_()
    (plain,) = torch.autograd.grad(energy(p, first), p)
    torch.testing.assert_close(torch.func.grad(lambda p: energy(p, first))(first.guess), plain)


def test_far_atoms_do_not_see_each_other(water) -> None:
    energy = network(water)
    apart = PLACES + torch.tensor([[0.0, 0, 0], [50.0, 0, 0], [0, 90.0, 0]], dtype=F64)
    rows = energy.known(water)[1](water.guess)
    found = [
        energy.of_rows(rows, Graph.of(replace(water, positions=places), energy.config))
        for places in (apart, apart + torch.tensor([[0.0], [7.0], [0.0]], dtype=F64))
    ]
    torch.testing.assert_close(found[0], found[1])


def test_the_hessian_has_it(water) -> None:
    learned = functional(water, "density")
    p = water.guess.clone()
    exact = torch.autograd.functional.hessian(lambda q: learned(q, water), p)
    torch.testing.assert_close(hessian(learned, p, water), exact, rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="gradient of a loss"):
        mixed(learned, p, water, ["network.linear"])


def test_a_potential_is_the_tangent_at_the_guess(water) -> None:
    both = {at: functional(water, at) for at in ("guess", "density")}
    p = water.guess.clone().requires_grad_()
    values = {at: one(p, water) for at, one in both.items()}
    slopes = {at: torch.autograd.grad(value, p)[0] for at, value in values.items()}
    torch.testing.assert_close(values["guess"], values["density"])
    torch.testing.assert_close(slopes["guess"], slopes["density"])
    bare = OrbitalFree(OrbitalFreeConfig(hidden=0))
    torch.testing.assert_close(hessian(both["guess"], water.reference, water), hessian(bare, water.reference, water))


@pytest.mark.parametrize("at", ["guess", "density"])
def test_its_gradient_through_the_minimum(water, at) -> None:
    """Against finite differences of the minimum."""
    learned, metric = functional(water, at), ti.Metric(water.overlap)
    solver = ti.LBFGS(rtol=0.0, atol=1e-9, max_steps=500)

    def loss() -> Tensor:
        p = ti.solve(learned.problem(water, metric), water.guess, solver=solver).value
        return 0.5 * (p - water.reference) @ water.overlap @ (p - water.reference)

    weight = learned.network.linear
    (exact,) = torch.autograd.grad(loss(), weight)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5), dtype=F64)
    values, step = [], 1e-3
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * step * direction)
            values.append(float(loss()))
            weight.sub_(sign * step * direction)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float((exact * direction).sum()), rel=1e-4)


def test_what_it_was_not_made_for_is_refused(water) -> None:
    energy = network(water)
    with pytest.raises(ValueError, match=r"charge \[7\]"):
        energy(water.guess, made(charges=(7, 1, 1)))
    few = CoefficientNetwork(NetworkConfig(elements=(1, 8), shells=(1, 1, 1)))
    with pytest.raises(ValueError, match="more shells"):
        few(water.guess, water)
    for wrong in ({"elements": ()}, {"shells": ()}, {"width": 0}, {"rounds": -1}, {"reach": 0.5}):
        with pytest.raises(ValueError, match="NetworkConfig"):
            NetworkConfig(**({"elements": (1,), "shells": (2,)} | wrong))
    with pytest.raises(ValueError, match="network_at"):
        OrbitalFreeConfig(network_at="nowhere")


def test_coefficients_are_brought_to_one_scale(water) -> None:
    energy = network(water)
    draw = torch.Generator().manual_seed(7)
    ps = water.guess + torch.randn(50, water.size, generator=draw, dtype=F64)
    graph, rows = energy.known(water)
    energy.scale([rows(ps)], [graph.kinds])
    x = (rows(ps) - energy.mean[graph.kinds]) / energy.spread[graph.kinds]
    hydrogen = x[:, 1:, :2].flatten(0, 1)
    torch.testing.assert_close(hydrogen.mean(dim=0), torch.zeros(2, dtype=F64), rtol=0, atol=1e-8)
    torch.testing.assert_close(hydrogen.square().mean(dim=0), torch.ones(2, dtype=F64), rtol=1e-6, atol=0)
