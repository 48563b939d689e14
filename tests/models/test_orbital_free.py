"""The density functional: every known term against a closed form, its derivatives, and what is fitted to begin with."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import torchimplicit as ti
from torchimplicit.diagnostics import curvature
from torchimplicit.linear import ReferenceHessian
from torchimplicit.models.orbital_free import Molecule, OrbitalFree, OrbitalFreeConfig, fit_constants, fit_linear
from torchimplicit.models.orbital_free.functional import features
from torchimplicit.models.orbital_free.local import (
    EXCHANGE,
    THOMAS_FERMI,
    lda,
    pbe,
    positive_part,
    reduced_gradient,
    thomas_fermi,
    weizsaecker,
)
from torchimplicit.models.orbital_free.on_grid import OnGrid
from torchimplicit.models.orbital_free.response import response
from torchimplicit.models.orbital_free.second import hessian, mixed

F64 = torch.float64
EXPONENTS = torch.tensor([0.35, 0.9, 2.4], dtype=F64)
BOND = 1.4


def boys(t: Tensor) -> Tensor:
    """F0, of the Coulomb integrals of s functions."""
    small = t < 1e-8
    root = torch.where(small, 1, t).sqrt()
    return torch.where(small, 1 - t / 3, 0.5 * math.sqrt(math.pi) * torch.erf(root) / root)


def gaussians(positions: Tensor, charges: Tensor, points: Tensor, quadrature: Tensor) -> Molecule:
    """Atoms with three s functions each, :math:`(a/\\pi)^{3/2}e^{-ar^2}`, all of whose integrals have closed forms."""
    atoms, shells = len(charges), len(EXPONENTS)
    a = EXPONENTS.repeat(atoms)
    centre = positions.repeat_interleave(shells, dim=0)
    total, product = a[:, None] + a, a[:, None] * a
    squared = (centre[:, None] - centre).square().sum(dim=-1)
    reduced = product / total
    overlap = (reduced / math.pi) ** 1.5 * torch.exp(-reduced * squared)
    coulomb = 2 * (reduced / math.pi).sqrt() * boys(reduced * squared)
    nuclear = (centre[:, None] - positions).square().sum(dim=-1)
    external = -(charges * 2 * (a[:, None] / math.pi).sqrt() * boys(a[:, None] * nuclear)).sum(dim=1)
    offset = points[:, None] - centre
    values = (a / math.pi) ** 1.5 * torch.exp(-a * offset.square().sum(dim=-1))
    gradients = -2 * a[None, None] * offset.permute(2, 0, 1) * values
    electrons = charges.sum().double()
    guess = torch.full((atoms * shells,), float(electrons) / (atoms * shells), dtype=F64)
    pair = (positions[:, None] - positions).square().sum(dim=-1).sqrt()
    charge = charges[:, None] * charges
    upper = torch.triu(torch.ones_like(pair, dtype=torch.bool), 1)
    return Molecule(
        name="made up",
        charges=charges,
        positions=positions,
        electrons=electrons,
        overlap=overlap,
        coulomb=coulomb,
        weight=torch.ones(atoms * shells, dtype=F64),
        external=external,
        atom=torch.arange(atoms).repeat_interleave(shells),
        angular=torch.zeros(atoms * shells, dtype=torch.int64),
        shell=torch.arange(shells).flip(0).repeat(atoms),
        basis=OnGrid.of(values, gradients),
        quadrature=quadrature,
        points=points,
        reference=guess * (1 + 0.1 * torch.tensor([1.0, -1.0, 0.0], dtype=F64)).repeat(atoms),
        guess=guess,
        energy=torch.tensor(-1.1, dtype=F64),
        repulsion=(charge[upper] / pair[upper]).sum() if atoms > 1 else torch.zeros((), dtype=F64),
        kinetic=torch.tensor(1.1, dtype=F64),
        exchange_correlation=torch.tensor(-0.6, dtype=F64),
    )


def atom() -> Molecule:
    """One, with a radial grid along x that is exact for what is round."""
    r = torch.linspace(0, 12, 4001, dtype=F64)[1:]
    weights = 4 * math.pi * r**2 * 12 / 4000
    points = torch.stack((r, torch.zeros_like(r), torch.zeros_like(r)), dim=1)
    return gaussians(torch.zeros(1, 3, dtype=F64), torch.tensor([2]), points, weights)


@pytest.fixture(scope="module")
def pair() -> Molecule:
    """Two atoms, and a coarse grid: the functional is smooth whatever the grid."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.tensor([[0.0, 0, 0], [0, 0, BOND]], dtype=F64)
    points = 2 * torch.randn(60, 3, dtype=F64, generator=generator) + positions.mean(dim=0)
    return gaussians(positions, torch.tensor([1, 1]), points, torch.full((60,), 0.8, dtype=F64))


def perturbed(**options) -> OrbitalFree:
    """With a network that does something."""
    generator = torch.Generator().manual_seed(1)
    functional = OrbitalFree(OrbitalFreeConfig(hidden=4, **options))
    with torch.no_grad():
        for parameter in functional.factor.parameters():
            parameter.normal_(std=0.3, generator=generator)
        functional.reference.normal_(std=0.1, generator=generator)
    return functional


class TestLocal:
    """A density of N electrons in one Gaussian of exponent a; and the uniform gas."""

    a, electrons = 0.9, 2.0

    def gaussian(self) -> tuple[Tensor, Tensor, Tensor]:
        molecule = atom()
        rho, *slopes = self.electrons * molecule.fields(torch.tensor([0.0, 1.0, 0.0], dtype=F64))
        return rho, torch.stack(slopes).square().sum(dim=0), molecule.quadrature

    def power(self, k: float) -> float:
        return self.electrons**k * (self.a / math.pi) ** (1.5 * k) * (math.pi / (k * self.a)) ** 1.5

    def test_thomas_fermi(self):
        rho, _, weights = self.gaussian()
        assert float(weights @ thomas_fermi(rho)) == pytest.approx(THOMAS_FERMI * self.power(5 / 3), rel=1e-6)
        assert pytest.approx(2.871234, abs=1e-6) == THOMAS_FERMI

    def test_weizsaecker(self):
        rho, sigma, weights = self.gaussian()
        assert float(weights @ weizsaecker(rho, sigma, 1e-30)) == pytest.approx(
            0.75 * self.a * self.electrons, rel=1e-6
        )

    def test_exchange(self):
        rho, _, weights = self.gaussian()
        assert float(weights @ (EXCHANGE * rho ** (4 / 3))) == pytest.approx(EXCHANGE * self.power(4 / 3), rel=1e-6)
        assert pytest.approx(-0.738559, abs=1e-6) == EXCHANGE

    @pytest.mark.parametrize(
        ("rs", "rydberg"), [(1, -0.1200), (2, -0.0902), (5, -0.0563), (10, -0.0372), (20, -0.0230), (50, -0.0114)]
    )
    def test_correlation_is_that_of_monte_carlo(self, rs, rydberg):
        """Ceperley and Alder (1980), table I, to which Perdew and Wang fitted."""
        assert 2 * float(self.correlation(torch.tensor(float(rs), dtype=F64))) == pytest.approx(rydberg, rel=0.015)

    def test_correlation_of_a_dense_gas(self):
        """Gell-Mann and Brueckner (1957): 0.0311 ln rs - 0.0466, up to terms that vanish with rs."""
        rs = torch.tensor([1e-5, 1e-6], dtype=F64)
        found = self.correlation(rs)
        slope = float((found[0] - found[1]) / math.log(10))
        assert slope == pytest.approx((1 - math.log(2)) / math.pi**2, rel=1e-3)
        assert float(found[1]) == pytest.approx(slope * math.log(1e-6) - 0.04664, abs=2e-5)

    @pytest.mark.parametrize("name", ["lda_x", "lda_c_pw_mod"])
    def test_against_libxc(self, name):
        libxc = pytest.importorskip("pyscf.dft.libxc")
        rs = torch.tensor([0.5, 1.0, 2.0, 5.0, 10.0], dtype=F64)
        rho = 3 / (4 * math.pi * rs**3)
        per_electron = torch.from_numpy(libxc.eval_xc(name, rho.numpy())[0])
        ours = EXCHANGE * rho ** (1 / 3) if name == "lda_x" else self.correlation(rs)
        torch.testing.assert_close(ours, per_electron, rtol=1e-9, atol=0)

    def test_pbe_against_libxc(self):
        """Energy and both derivatives, from the uniform limit to gradients of an electron's tail."""
        libxc = pytest.importorskip("pyscf.dft.libxc")
        rho = torch.logspace(-4, 2, 13, dtype=F64).repeat_interleave(5)
        s = torch.tensor([0.0, 0.3, 1.0, 3.0, 10.0], dtype=F64).repeat(13)
        slope = 2 * (3 * math.pi**2) ** (1 / 3) * rho ** (4 / 3) * s
        zero = torch.zeros_like(rho)
        energy, (v_rho, v_sigma, *_), _, _ = libxc.eval_xc("pbe,pbe", torch.stack([rho, slope, zero, zero]).numpy())
        rho.requires_grad_()
        sigma = slope.square().requires_grad_()
        ours = pbe(rho, sigma)
        by_rho, by_sigma = torch.autograd.grad(ours.sum(), (rho, sigma))
        torch.testing.assert_close(ours / rho, torch.from_numpy(energy), rtol=2e-6, atol=0)
        torch.testing.assert_close(by_rho, torch.from_numpy(v_rho), rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(by_sigma, torch.from_numpy(v_sigma), rtol=1e-5, atol=1e-8)

    @staticmethod
    def correlation(rs: Tensor) -> Tensor:
        rho = 3 / (4 * math.pi * rs**3)
        return (lda(rho) - EXCHANGE * rho ** (4 / 3)) / rho

    def test_the_reduced_gradient(self):
        rho, sigma = torch.tensor([0.3, 2.0], dtype=F64), torch.tensor([0.5, 0.1], dtype=F64)
        s = sigma.sqrt() / (2 * (3 * math.pi**2) ** (1 / 3) * rho ** (4 / 3))
        torch.testing.assert_close(reduced_gradient(rho, sigma), s.square())


class TestPositivePart:
    width = 1e-3

    def test_is_positive_and_near(self):
        rho = torch.tensor([-1e6, -1.0, -1e-3, 0.0, 1e-3, 1.0, 1e6], dtype=F64)
        plus = positive_part(rho, self.width)
        assert (plus > 0).all()
        assert float((plus - rho.clamp_min(0)).max()) == pytest.approx(self.width / 2)
        torch.testing.assert_close(plus, 0.5 * (rho + (rho.square() + self.width**2).sqrt()), rtol=1e-6, atol=1e-10)

    def test_has_two_derivatives(self):
        rho = torch.linspace(-0.01, 0.01, 41, dtype=F64).requires_grad_()
        assert torch.autograd.gradgradcheck(lambda r: positive_part(r, self.width), rho[::5], eps=1e-7, atol=1e-3)


class TestEnergy:
    def test_its_parts(self, pair):
        functional = OrbitalFree()
        p = pair.reference
        with torch.no_grad():
            parts = functional.parts(p, pair)
            energy = functional(p, pair)
        assert float(parts["hartree"]) == pytest.approx(float(p @ pair.coulomb @ p) / 2)
        assert float(parts["external"]) == pytest.approx(float(p @ pair.external))
        assert float(parts["repulsion"]) == pytest.approx(1 / BOND)
        assert float(parts["reference"]) == float(parts["constants"]) == 0
        assert float(sum(parts.values())) == pytest.approx(float(energy))

    def test_an_atom_against_closed_forms(self):
        """Two electrons in one Gaussian round a charge of 2."""
        molecule, a = atom(), float(EXPONENTS[1])
        p = torch.tensor([0.0, 2.0, 0.0], dtype=F64)
        parts = OrbitalFree(OrbitalFreeConfig(weizsaecker=1.0, width=1e-9)).parts(p, molecule)
        gas = THOMAS_FERMI * 2 ** (5 / 3) * (a / math.pi) ** 2.5 * (3 * math.pi / (5 * a)) ** 1.5
        assert float(parts["kinetic"]) == pytest.approx(gas + 1.5 * a, rel=1e-5)
        assert float(parts["hartree"]) == pytest.approx(2 * math.sqrt(2 * a / math.pi))
        assert float(parts["external"]) == pytest.approx(-2 * 2 * 2 * math.sqrt(a / math.pi))

    def test_of_hydrogen_beside_kohn_sham(self, h2):
        """The functional of exchange and correlation is that of the calculation; the density is a fit to its own."""
        parts = {k: float(v.detach()) for k, v in OrbitalFree().parts(h2.reference, h2).items()}
        # the positive part moves the tail a little
        assert parts["exchange_correlation"] == pytest.approx(float(h2.exchange_correlation), abs=5e-3)
        potential = parts["hartree"] + parts["external"] + parts["repulsion"] + parts["exchange_correlation"]
        assert potential + float(h2.kinetic) == pytest.approx(float(h2.energy), abs=6e-3)
        # two electrons in one orbital: the von Weizsaecker energy is the kinetic energy
        plain = OrbitalFree(OrbitalFreeConfig(weizsaecker=1.0, width=1e-9)).parts(h2.reference, h2)["kinetic"]
        gas = h2.quadrature @ thomas_fermi(positive_part(h2.density(h2.reference), 1e-9))
        assert float(plain - gas) == pytest.approx(float(h2.kinetic), rel=1e-3)

    def test_a_vacuum_has_no_energy(self, pair):
        """However far the grid extends."""
        functional = perturbed()
        with torch.no_grad():
            parts = functional.parts(torch.zeros_like(pair.reference), pair)
        assert float(sum(parts.values()) - parts["repulsion"]) == pytest.approx(0, abs=1e-15)

    @pytest.mark.parametrize("name", ["lda", "pbe"])
    def test_derivatives(self, pair, name):
        functional = perturbed(exchange_correlation=name)
        p = pair.reference.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda p: functional(p, pair), p)
        assert torch.autograd.gradgradcheck(lambda p: functional(p, pair), p)
        known = torch.autograd.functional.hessian(lambda p: functional(p, pair), pair.reference)
        torch.testing.assert_close(hessian(functional, pair.reference, pair), known)

    def test_derivatives_where_the_density_is_negative(self, pair):
        functional = perturbed(penalty=0.0)  # the penalty's second derivative jumps at zero
        p = (pair.reference * torch.tensor([1.0, -2.0, 1.0] * 2, dtype=F64)).requires_grad_()
        rho = pair.density(p)
        assert float(rho.min()) < -5e-3 < 5e-3 < float(rho.max())
        assert torch.autograd.gradcheck(lambda p: functional(p, pair), p)
        second = torch.autograd.functional.hessian(lambda p: functional(p, pair), p.detach())
        assert bool(second.isfinite().all())

    def test_the_penalty_is_felt_where_the_density_is_negative_alone(self, pair):
        functional = OrbitalFree()
        assert float(functional.parts(pair.reference, pair)["penalty"]) == 0
        p = -pair.reference
        expected = 100 * float(pair.quadrature @ pair.density(p).square())
        assert float(functional.parts(p, pair)["penalty"]) == pytest.approx(expected)

    def test_the_assembled_mixed_derivatives(self, pair):
        functional, p = perturbed(), pair.reference
        names = [name for name, _ in functional.named_parameters()]
        found = mixed(functional, p, pair, names)
        leaf = p.clone().requires_grad_()
        (slope,) = torch.autograd.grad(functional(leaf, pair), leaf, create_graph=True)
        for i in range(len(p)):
            rows = torch.autograd.grad(slope[i], list(functional.parameters()), retain_graph=True, allow_unused=True)
            for name, row in zip(names, rows, strict=True):
                known = torch.zeros_like(found[name][i]) if row is None else row
                torch.testing.assert_close(found[name][i], known)

    def test_a_network_that_is_not_yet_trained_changes_nothing(self, pair):
        assert float(OrbitalFree()(pair.reference, pair)) == pytest.approx(
            float(OrbitalFree(OrbitalFreeConfig(hidden=0))(pair.reference, pair)), rel=1e-14
        )

    def test_features_are_of_order_one(self, h2):
        rho = positive_part(h2.density(h2.reference), 1e-3)
        seen = features(rho, h2.slopes(h2.reference).square().sum(dim=0))
        assert seen.shape == (len(h2.quadrature), 2)
        assert float(seen.abs().max()) < 5


class TestMinimum:
    def test_keeps_the_electrons_and_is_stationary(self, h2):
        functional, metric = OrbitalFree(), ti.Metric(h2.overlap)
        problem = functional.problem(h2, metric)
        solver = ti.LBFGS(preconditioner=ReferenceHessian(), rtol=0.0, atol=1e-9)
        solution = ti.solve(problem, h2.guess, solver=solver)
        assert int(solution.steps) < 20
        assert float(h2.count(solution.value)) == pytest.approx(2, abs=1e-10)
        assert float(curvature(problem, solution.value).least) > 0
        free = ti.solve(functional.problem(h2), h2.guess, solver=ti.LBFGS(rtol=0.0, atol=1e-7, max_steps=2000))
        torch.testing.assert_close(free.value, solution.value, atol=1e-5, rtol=0)

    def test_its_gradient_in_the_parameters(self, pair):
        functional = perturbed()
        metric = ti.Metric(pair.overlap)
        solver = ti.LBFGS(rtol=0.0, atol=1e-11, max_steps=500)

        def loss() -> Tensor:
            p = ti.solve(functional.problem(pair, metric), pair.guess, solver=solver).value
            gap = p - pair.reference
            return 0.5 * gap @ pair.overlap @ gap

        weight = functional.factor[-1].weight
        (exact,) = torch.autograd.grad(loss(), weight)
        direction, step = torch.ones_like(weight), 1e-4
        with torch.no_grad():
            weight += step * direction
            above = loss()
            weight -= 2 * step * direction
            below = loss()
        assert float((above - below) / (2 * step)) == pytest.approx(float((exact * direction).sum()), rel=1e-6)


class TestStarting:
    def away(self, functional: OrbitalFree, molecule: Molecule, metric: ti.Metric) -> float:
        """How far the minimum is from the reference, to first order."""
        p = molecule.reference.clone().requires_grad_()
        (slope,) = torch.autograd.grad(functional(p, molecule), p)
        return float((response(functional, molecule.reference, molecule, metric) @ slope).norm())

    def test_the_linear_term_makes_the_reference_nearly_the_minimum(self, h2):
        functional, metric = OrbitalFree(), ti.Metric(h2.overlap)
        before = self.away(functional, h2, metric)
        fit_linear(functional, [h2], [metric])
        after = self.away(functional, h2, metric)
        assert after < 0.7 * before  # what s functions can do
        solver = ti.LBFGS(rtol=0.0, atol=1e-9, max_steps=500)
        gap = ti.solve(functional.problem(h2, metric), h2.guess, solver=solver).value - h2.reference
        assert float((gap @ h2.overlap @ gap).sqrt()) == pytest.approx(after, rel=0.1)  # the minimum itself
        fit_linear(functional, [h2], [metric])
        assert self.away(functional, h2, metric) == pytest.approx(after, rel=1e-6)
        assert functional.reference[2:].eq(0).all()  # of elements that are not there

    def test_the_response_is_how_the_minimum_moves(self, pair):
        """Beside a minimum with a slope more, and no number of electrons changes it."""
        functional, metric = perturbed(), ti.Metric(pair.overlap)
        problem, solver = functional.problem(pair, metric), ti.LBFGS(rtol=0.0, atol=1e-12, max_steps=500)
        with torch.no_grad():
            p = ti.solve(problem, pair.guess, solver=solver).value
            more = 1e-5 * torch.randn(pair.size, generator=torch.Generator().manual_seed(0), dtype=F64)
            tilted = ti.Minimum(
                lambda q: functional(q, pair) + more @ q, problem.constraint, batched=False, metric=metric
            )
            moved = ti.solve(tilted, p, solver=solver).value - p
        answer = response(functional, p, pair, metric)
        torch.testing.assert_close(metric.root[0] @ moved, -answer @ more, rtol=1e-3, atol=1e-10)
        torch.testing.assert_close(answer @ pair.weight, torch.zeros(pair.size, dtype=F64), rtol=0, atol=1e-10)

    def test_two_molecules_share_it(self, pair):
        """The second has another bond; one coefficient for both."""
        positions = torch.tensor([[0.0, 0, 0], [0, 0, 1.8]], dtype=F64)
        other = gaussians(positions, pair.charges, pair.points, pair.quadrature)
        metrics = [ti.Metric(m.overlap) for m in (pair, other)]
        functional = OrbitalFree()
        before = [self.away(functional, m, metric) ** 2 for m, metric in zip((pair, other), metrics, strict=True)]
        fit_linear(functional, [pair, other], metrics)
        after = [self.away(functional, m, metric) ** 2 for m, metric in zip((pair, other), metrics, strict=True)]
        assert sum(after) < sum(before)
        best = functional.reference.clone()
        for change in (1e-2, -1e-2):  # no better one beside it
            with torch.no_grad():
                functional.reference.copy_(best)
                functional.reference[1, 1] += change
            moved = [self.away(functional, m, metric) ** 2 for m, metric in zip((pair, other), metrics, strict=True)]
            assert sum(moved) > sum(after)

    def test_molecules_of_different_elements_are_taken(self, pair):
        other = replace(pair, charges=torch.tensor([1, 8]))
        functional = OrbitalFree()
        fit_linear(functional, [pair, other], [pair.metric, other.metric])
        assert functional.elements.nonzero()[:, 0].tolist() == [1, 8]

    def test_the_constants_give_the_energies(self, pair):
        other = replace(pair, charges=torch.tensor([1, 8]), energy=torch.tensor(-75.0, dtype=F64))
        functional = OrbitalFree()
        fit_constants(functional, [pair, other])
        for molecule in (pair, other):
            assert float(functional(molecule.reference, molecule)) == pytest.approx(float(molecule.energy))
        assert functional.constants[2:8].eq(0).all()


class TestMolecule:
    def test_moves(self, pair):
        single = pair.to(dtype=torch.float32)
        assert single.fields(single.guess).dtype == torch.float32
        assert single.charges.dtype == torch.int64
        assert single.size == pair.size == 6
        torch.testing.assert_close(pair.count(pair.guess), pair.electrons)

    def test_its_slopes_are_those_of_the_density(self, pair):
        """By the definition of the Gaussians."""
        p, step = pair.reference, 1e-5
        for axis in range(3):
            shift = torch.zeros(3, dtype=F64)
            shift[axis] = step
            up, down = (
                gaussians(pair.positions, pair.charges, pair.points + s * shift, pair.quadrature).density(p)
                for s in (1, -1)
            )
            torch.testing.assert_close(pair.slopes(p)[axis], (up - down) / (2 * step), rtol=1e-6, atol=1e-9)


class TestElements:
    """Learned terms know the elements that they were fitted to, and no others."""

    @staticmethod
    def changed(pair: Molecule, charge: int) -> Molecule:
        return replace(pair, charges=torch.tensor([1, charge]))

    def test_before_a_fit_every_element_is_taken(self, pair):
        assert OrbitalFree()(pair.guess, self.changed(pair, 35)).isfinite()

    def test_others_are_refused_after_it(self, pair):
        functional = OrbitalFree()
        fit_linear(functional, [pair], [ti.Metric(pair.overlap)])
        other = self.changed(pair, 9)
        assert functional(pair.guess, pair).isfinite()
        for refused in (lambda: functional(pair.guess, other), lambda: ti.solve(functional.problem(other), pair.guess)):
            with pytest.raises(ValueError, match=r"nuclear charge \[9\], and this functional was fitted to .* \[1\]"):
                refused()

    def test_they_are_kept_with_the_weights(self, pair):
        functional, again = OrbitalFree(), OrbitalFree()
        fit_linear(functional, [pair], [ti.Metric(pair.overlap)])
        again.load_state_dict(functional.state_dict())
        assert again.elements.nonzero().tolist() == [[1]]

    def test_weights_of_an_earlier_version(self, pair):
        """Their tables ended at argon and at 24 shells, and did not tell the elements."""
        functional, again = OrbitalFree(), OrbitalFree()
        fit_linear(functional, [pair], [ti.Metric(pair.overlap)])
        old = functional.state_dict()
        del old["elements"]
        old |= {"reference": old["reference"][:19, :24], "constants": old["constants"][:19]}
        again.load_state_dict(old)
        for name, held in functional.state_dict().items():
            torch.testing.assert_close(again.state_dict()[name], held, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weizsaecker": -0.1}, "weizsaecker is -0.1, and must not be negative"),
        ({"penalty": -1.0}, "penalty is -1.0"),
        ({"hidden": -1}, "hidden is -1"),
        ({"width": 0.0}, r"width \(0.0\) must be positive"),
        ({"layers": 0}, r"layers \(0\) >= 1"),
        ({"exchange_correlation": "b3lyp"}, "exchange_correlation is 'b3lyp', and must be one of lda, pbe"),
        ({"weizsaecker": math.nan}, "weizsaecker is nan"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        OrbitalFreeConfig(**options)


def test_a_start_with_another_number_of_electrons_is_moved(pair):
    problem = OrbitalFree().problem(pair)
    solution = ti.solve(problem, 1.5 * pair.guess, solver=ti.LBFGS(atol=1e-6, max_steps=500))
    assert float(pair.count(solution.value)) == pytest.approx(2)
