"""The linear term that knows each atom's neighbours: the same whatever way the molecule is turned."""

from __future__ import annotations

from dataclasses import replace

import torch

from torchimplicit import LBFGS, Metric, Ragged, solve
from torchimplicit.models.orbital_free import OrbitalFree, OrbitalFreeConfig
from torchimplicit.models.orbital_free.on_grid import OnGrid
from torchimplicit.models.orbital_free.pairs import entries, shape
from torchimplicit.models.orbital_free.second import linear_columns

F64 = torch.float64
ELEMENTS = (1, 8)


def labels(atoms: int) -> dict[str, torch.Tensor]:
    """Of a basis with two s shells, a p and a d shell, and one f shell that the term leaves alone, at every atom."""
    angular = [0, 0, *[1] * 3, *[2] * 5, *[3] * 7]
    shell = [0, 1, *[0] * 15]
    return {
        "atom": torch.arange(atoms).repeat_interleave(len(angular)),
        "angular": torch.tensor(angular * atoms),
        "shell": torch.tensor(shell * atoms),
    }


def molecule(h2, positions, charges=(8, 1, 1)):
    """Only what the term looks at is right."""
    own = labels(len(charges))
    size = len(own["atom"])
    return replace(h2, positions=positions, charges=torch.tensor(charges), weight=torch.ones(size, dtype=F64), **own)


def term(h2, positions, charges=(8, 1, 1)):
    torch.manual_seed(0)
    functional = OrbitalFree(OrbitalFreeConfig(pairs=ELEMENTS, hidden=0))
    torch.nn.init.normal_(functional.pairs)
    torch.nn.init.normal_(functional.reference)
    made = molecule(h2, positions, charges)
    return functional, made, functional.linear(made).detach()


def places():
    return torch.tensor([[0.1, 0.0, 0.3], [1.4, 1.2, 0.2], [-1.3, 1.0, -0.6]], dtype=F64)


def quadrupole(a):
    """The symmetric traceless matrix of five l=2 components in the basis' order."""
    xy, yz, zz, xz, xxyy = a
    root = 3**0.5
    matrix = torch.zeros(3, 3, dtype=F64)
    matrix[0, 0], matrix[1, 1], matrix[2, 2] = xxyy / root - zz / 3, -xxyy / root - zz / 3, 2 * zz / 3
    matrix[0, 1] = matrix[1, 0] = xy / root
    matrix[1, 2] = matrix[2, 1] = yz / root
    matrix[0, 2] = matrix[2, 0] = xz / root
    return matrix


def test_it_turns_with_the_molecule(h2):
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=F64, generator=torch.Generator().manual_seed(1))).Q
    _, made, before = term(h2, places())
    _, _, after = term(h2, places() @ turn.T + 2.0)
    for atom in range(3):
        own = made.atom == atom
        scalars = own & (made.angular == 0)
        torch.testing.assert_close(after[scalars], before[scalars])
        vectors = own & (made.angular == 1)
        torch.testing.assert_close(after[vectors], turn @ before[vectors])
        five = own & (made.angular == 2)
        torch.testing.assert_close(quadrupole(after[five]), turn @ quadrupole(before[five]) @ turn.T)
        assert not after[own & (made.angular == 3)].any()
    assert float(before[made.angular == 2].abs().max()) > 0.1


def test_atoms_of_other_elements_have_none_and_a_distant_atom_adds_none(h2):
    functional, made, alone = term(h2, places(), (8, 1, 9))
    third = made.atom == 2
    assert not alone[third & (made.angular > 0)].any()
    far = places()
    far[2] += 100
    _, _, near = term(h2, far, (8, 1, 1))
    torch.testing.assert_close(alone[~third], near[~third])
    assert functional.pairs.shape == shape(ELEMENTS)


def test_the_columns_are_the_derivative(h2):
    functional, made, found = term(h2, places())
    coefficients = torch.cat([functional.reference.detach().reshape(-1), functional.pairs.detach().reshape(-1)])
    torch.testing.assert_close(linear_columns(functional, made) @ coefficients, found)
    rows, at, values = entries(made, ELEMENTS)
    assert len(rows) == len(at) == len(values)
    assert int(at.max()) < functional.pairs.numel()


def test_molecules_of_different_size_are_one_batch(h2):
    """Solved together, each density is what it is alone, and so is the gradient."""
    kept = (h2.angular == 0).nonzero()[:, 0]  # without its p and d functions: another, smaller molecule
    smaller = replace(
        h2,
        overlap=h2.overlap[kept][:, kept],
        coulomb=h2.coulomb[kept][:, kept],
        basis=OnGrid.of(*(one[..., kept] for one in h2.basis.dense())),
        **{name: getattr(h2, name)[kept] for name in ("weight", "external", "atom", "angular", "shell", "guess")},
    )
    molecules = [h2, smaller]
    functional = OrbitalFree(OrbitalFreeConfig(hidden=4))
    torch.nn.init.normal_(functional.factor[-1].weight, std=0.05)
    solver = LBFGS(rtol=0.0, atol=1e-9)
    starts = [m.guess for m in molecules]
    ragged = Ragged.of(starts)
    problem = ragged.minimum(
        [lambda p, m=m: functional(p, m) for m in molecules],
        [m.weight for m in molecules],
        [m.electrons for m in molecules],
        [m.overlap for m in molecules],
    )
    together = ragged.unpack(solve(problem, ragged.pack(starts), solver=solver).value)
    gradients = []
    alone = [solve(functional.problem(m, Metric(m.overlap)), m.guess, solver=solver).value for m in molecules]
    for found in (together, alone):
        loss = sum(m.density(p).square() @ m.quadrature for m, p in zip(molecules, found, strict=True))
        gradients.append(torch.autograd.grad(loss, functional.factor[-1].weight)[0])
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)
