"""Attacks on classifiers with an equilibrium inside, against each other and against what they promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchimplicit as ti
from torchimplicit.attacks import JIIO, PGD, Attack
from torchimplicit.models import MDEQ, mdeq_small

LABELS = torch.arange(6)


class Cell(nn.Module):
    """A contraction with a weight that is normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = ti.nn.spectral_norm(nn.Linear(12, 12, bias=False), bound=0.6)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(self.mixing(z) + u)


class Net(nn.Module):
    """A user's own: code before the equilibrium, code after it that looks at the image again."""

    def __init__(self, layers: int = 1):
        super().__init__()
        self.injection = nn.Linear(64, 12)
        exact = ti.Anderson(rtol=1e-6, max_steps=100)
        self.equilibria = nn.ModuleList(ti.nn.Equilibrium(Cell(), solver=exact, rowwise=True) for _ in range(layers))
        self.skip, self.head = nn.Linear(64, 10), nn.Linear(12, 10)

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1) - 0.3
        z = self.injection(flat)
        for layer in self.equilibria:
            z = layer(z)
        return 4 * self.head(torch.tanh(z)) + self.skip(flat)


def made(layers: int = 1) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    net = Net(layers).double().train()
    net(torch.rand(2, 64).double())
    return net, torch.rand(6, 1, 8, 8).double()


def losses(net: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return functional.cross_entropy(net(images), LABELS, reduction="none")


@pytest.mark.parametrize(("norm", "radius", "layers"), [("l2", 0.5, 1), ("linf", 0.05, 2)])
def test_both_come_to_the_same_strength_within_ball_and_range(norm: Any, radius: float, layers: int) -> None:
    net, images = made(layers)
    net.eval()
    clean = losses(net, images)
    set_: dict[str, Any] = {"radius": radius, "norm": norm}
    ways: list[Attack] = [
        JIIO(net, **set_, steps=80, step_size=0.5, last_step_size=0.1),
        PGD(net, **set_, steps=10, step_size=0.5),
    ]
    found = []
    for attack in ways:
        changed = attack(images, LABELS)
        change = changed - images
        size = change.flatten(1).norm(dim=1) if norm == "l2" else change.flatten(1).abs().amax(dim=1)
        assert float(size.max()) <= radius * (1 + 1e-9)
        assert float(changed.min()) >= 0
        assert float(changed.max()) <= 1
        assert bool(((changed == 0) | (changed == 1)).any()), "the range of the pixels binds"
        found.append(losses(net, changed))
    assert bool((found[0] > clean + 0.1).all())
    torch.testing.assert_close(found[0], found[1], rtol=2e-2, atol=0)


@pytest.mark.parametrize("kind", [JIIO, PGD])
def test_a_target_becomes_likelier(kind: Any) -> None:
    net, images = made()
    attack = kind(net, radius=0.5, steps=10, targeted=True)
    assert bool((losses(net.eval(), attack(images, LABELS)) < losses(net, images) - 0.1).all())


@pytest.mark.parametrize("kind", [JIIO, PGD])
def test_the_model_is_left_as_it_was(kind: Any) -> None:
    net, images = made()
    net.skip.eval()
    net.head.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    solution = net.equilibria[0].solution
    kind(net, radius=0.5, steps=2)(images, LABELS)
    assert net.training
    assert net.equilibria[0].training
    assert not net.skip.training
    assert not net.head.weight.requires_grad
    assert net.skip.weight.requires_grad
    assert all(weight.grad is None for weight in net.parameters())
    assert net.equilibria[0].solution is solution
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_cold_solves_of_pgd_find_the_same_and_cost_more() -> None:
    net, images = made()
    ways: dict[str, Any] = {"radius": 0.5, "steps": 4, "step_size": 1.0, "last_step_size": 0.25}
    warm, cold = (PGD(net, **ways, warm_start=warm).find(images, LABELS) for warm in (True, False))
    torch.testing.assert_close(warm.images, cold.images, rtol=0, atol=1e-3)
    assert cold.evaluations > warm.evaluations + 4


def test_steps_fall_geometrically_from_the_first_to_the_last() -> None:
    attack = PGD(made()[0], radius=2.0, steps=3, step_size=1.0, last_step_size=0.25)
    assert [attack._size(step) for step in (1, 2, 3)] == pytest.approx([2.0, 1.0, 0.5])


def test_a_multiscale_model() -> None:
    torch.manual_seed(0)
    model = MDEQ(mdeq_small(channels=(8, 8), head_channels=(4, 4), final_channels=8))
    images = torch.rand(4, 1, 8, 8)
    found = JIIO(model, radius=0.5, steps=3).find(images, LABELS[:4])
    assert bool((found.change.flatten(1).norm(dim=1) <= 0.5 * (1 + 1e-6)).all())
    assert [part.shape for part in found.states[0]] == [(4, 8, 4, 4), (4, 8, 2, 2)]
    assert found.evaluations >= 6


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = ti.nn.Equilibrium(Cell(), solver=ti.Anderson(rtol=1e-4))

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return 0.4 * self.inner(z + u)


class WithAux(Cell):
    def forward(self, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        z = super().forward(z, u)
        return z, z.square()


@pytest.mark.parametrize("cell", [Nested, WithAux])
def test_cells_that_hold_an_equilibrium_of_their_own_or_return_more_than_a_state(cell: Any) -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = ti.nn.Equilibrium(cell(), has_aux=cell is WithAux)

        def forward(self, images: Tensor) -> Tensor:
            found = self.layer(images)
            return torch.cat(found, dim=1) if cell is WithAux else found

    torch.manual_seed(0)
    net, images = Scores().double(), torch.rand(6, 12).double()
    clean = losses(net.eval(), images)
    for attack in (JIIO(net, radius=0.5, steps=5), PGD(net, radius=0.5, steps=1)):
        assert bool((losses(net, attack(images, LABELS)) > clean).all())


def test_what_cannot_be_attacked_is_said() -> None:
    net, images = made()
    with pytest.raises(ValueError, match="contains no torchimplicit"):
        JIIO(nn.Linear(4, 2), radius=0.5)(torch.rand(2, 4), LABELS[:2])
    with pytest.raises(ValueError, match="batched=False"):
        PGD(ti.nn.Equilibrium(Cell(), batched=False), radius=0.5)(torch.rand(2, 12), LABELS[:2])
    with pytest.raises(ValueError, match=r"\[batch, classes\]"):
        JIIO(nn.Sequential(ti.nn.Equilibrium(Cell()), nn.Flatten(0)), radius=0.5)(torch.rand(2, 12), LABELS[:2])
    unused = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    unused.layer = ti.nn.Equilibrium(Cell())
    unused.forward = lambda x: unused[1](unused[0](x))
    with pytest.raises(ValueError, match="did not use it"):
        JIIO(unused, radius=0.5)(images.float(), LABELS)
    with pytest.raises(ValueError, match="give low= and high="):
        JIIO(net, radius=0.5)(2 * images, LABELS)
    with pytest.raises(ValueError, match="one class for each"):
        JIIO(net, radius=0.5)(images, LABELS[:3])
    with pytest.raises(ValueError, match="radius"):
        PGD(net, radius=0)
    with pytest.raises(ValueError, match="last_step_size"):
        JIIO(net, radius=1, last_step_size=-1.0)
    with pytest.raises(ValueError, match='"l2" or "linf"'):
        PGD(net, radius=1, norm="l1")  # type: ignore[arg-type]


def test_joint_inference_that_starts_at_the_equilibrium_is_stronger_after_few_steps() -> None:
    net, images = made()
    ways: dict[str, Any] = {"radius": 0.5, "steps": 3, "step_size": 1.0, "damping": (1.0, 1.0, 1.0)}
    started = JIIO(net, **ways).find(images, LABELS)
    cold = JIIO(net, **ways, start=None).find(images, LABELS)
    assert losses(net.eval(), started.images).mean() > losses(net, cold.images).mean()
    assert cold.evaluations == 6, "each step is one evaluation and one product"
    assert started.solves[0].status.tolist() == [ti.Status.STEPS_TAKEN] * 6
    stopped = JIIO(net, **ways | {"steps": 400}, tolerance=1e-2).find(images, LABELS)
    assert stopped.solves[0].steps.float().mean() < 400


def test_a_start_that_is_not_solved_does_not_stop_the_attack() -> None:
    net, images = made()
    net.equilibria[0].throw = True
    attack = JIIO(net, radius=0.5, steps=3, start=ti.FixedPointIteration(rtol=1e-12, max_steps=1))
    assert bool(attack(images, LABELS).isfinite().all())
