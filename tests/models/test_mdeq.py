"""The multiscale deep equilibrium model."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn import functional

import torchimplicit as ti
from torchimplicit.models import MDEQ, MDEQConfig, mdeq_imagenet, mdeq_large, mdeq_small, mdeq_tiny
from torchimplicit.nn import VariationalDropout


@pytest.fixture(autouse=True)
def _calm():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ti.ConvergenceWarning)
        yield
    torch.set_num_threads(before)


def miniature(**changes):
    """Two resolutions of a few channels."""
    config = MDEQConfig(
        image_channels=1, classes=3, channels=(4, 4), head_channels=(1, 2), final_channels=4, expansion=2, groups=2
    )
    return replace(config, **changes)


def calmed(model):
    """Shifts that outweigh what is normalized: the map contracts, so that an unrolled solver's gradient converges."""
    for module in model.equilibrium.cell.modules():
        if isinstance(module, torch.nn.GroupNorm) and module.affine:
            torch.nn.init.normal_(module.bias, std=2)
            torch.nn.init.uniform_(module.weight, 0.2, 0.6)
    return model


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(mdeq_tiny(), 158_890), (mdeq_large(), 11_097_438), (mdeq_imagenet(), 16_808_936), (mdeq_small(), 54_650)],
    ids=["tiny", "large", "imagenet", "small"],
)
def test_parameter_counts(config, parameters):
    with torch.device("meta"):
        model = MDEQ(config)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(("size", "downsamplings"), [(8, 0), (7, 0), (9, 1), (28, 2)])
def test_the_state_has_one_entry_a_resolution(size, downsamplings):
    config = mdeq_small(channels=(4, 8, 16), head_channels=(2, 2, 4), downsamplings=downsamplings, classes=5)
    model = MDEQ(config, solver=ti.Anderson(max_steps=2))
    assert model(torch.rand(2, 1, size, size)).shape == (2, 5)
    state = model.equilibrium.solution.value
    sizes = [s.shape[2] for s in state]
    assert [s.shape[1] for s in state] == [4, 8, 16]
    assert all(fine in (2 * coarse, 2 * coarse - 1) for fine, coarse in pairwise(sizes))


def test_one_branch_and_many_blocks():
    model = MDEQ(miniature(channels=(4,), head_channels=(2,), blocks=(3,)), solver=ti.Anderson(max_steps=2))
    assert model(torch.rand(2, 1, 4, 4)).shape == (2, 3)
    assert len(model.equilibrium.cell.branches[0].others) == 2


def gradients(model, images, solver, gradient):
    model.equilibrium.solver, model.equilibrium.gradient = solver, gradient
    loss = functional.cross_entropy(model(images), torch.tensor([0, 2, 1]))
    return torch.autograd.grad(loss, tuple(model.parameters()))


def test_implicit_gradients_are_those_of_an_unrolled_solver():
    model = calmed(MDEQ(miniature())).double().eval()
    images = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    linear = ti.linear.GMRES(rtol=1e-12, max_steps=400)
    exact = gradients(model, images, ti.Broyden(rtol=1e-13, max_steps=300), ti.Implicit(linear_solver=linear))
    assert model.equilibrium.solution.converged.all()
    unrolled = gradients(model, images, ti.Anderson(memory=40, rtol=1e-13, max_steps=300), ti.Unrolled())
    assert model.equilibrium.solution.converged.all()
    for a, b in zip(exact, unrolled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


def test_every_image_is_treated_on_its_own_with_dropout_too():
    # rowwise=True rests on it; the loop checks the promise where samples leave the batch
    model = MDEQ(miniature(dropout=0.3))
    equilibrium, cell = model.equilibrium, model.equilibrium.cell
    x = torch.randn(4, 4, 4, 4)
    state = [torch.randn_like(z) for z in cell.initial_state(x)]
    dropouts = [m for m in cell.modules() if isinstance(m, VariationalDropout)]
    masks = [torch.bernoulli(torch.full_like(like, 0.7)) / 0.7 for like in state]
    for dropout, mask in zip(dropouts, masks, strict=True):
        dropout.held = mask
    whole = cell(state, x)
    for row in range(4):
        for dropout, mask in zip(dropouts, masks, strict=True):
            dropout.held = mask[row : row + 1]
        alone = cell([z[row : row + 1] for z in state], x[row : row + 1])
        torch.testing.assert_close([z[row : row + 1] for z in whole], alone)
    for dropout in dropouts:
        dropout.held = None
    assert equilibrium.rowwise
    model(torch.rand(16, 1, 4, 4)).sum().backward()


def test_dropout_acts_in_training_and_not_in_eval():
    model = MDEQ(miniature(dropout=0.5), solver=ti.Anderson(max_steps=5))
    x = torch.randn(4, 4, 4, 4)
    assert not torch.equal(model.equilibrium(x)[0], model.equilibrium(x)[0])
    model.eval()
    assert torch.equal(model.equilibrium(x)[0], model.equilibrium(x)[0])


def test_every_parameter_gets_a_gradient():
    model = MDEQ(miniature(), solver=ti.Broyden(max_steps=10), gradient=ti.UnrolledPhantom())
    functional.cross_entropy(model(torch.rand(6, 1, 8, 8)), torch.arange(6) % 3).backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert not dead


def test_copies_and_state_dicts_give_the_same_scores():
    model = MDEQ(miniature(), solver=ti.Anderson(max_steps=5))
    images = torch.rand(4, 1, 8, 8)
    model(images).sum().backward()
    model.eval()
    twin = copy.deepcopy(model)
    other = MDEQ(model.config, solver=ti.Anderson(max_steps=5)).eval()
    other.load_state_dict(model.state_dict())
    for same in (twin, other):
        assert torch.equal(same(images), model(images))


def test_it_runs_under_autocast_with_a_state_in_full_precision():
    model = MDEQ(miniature(dropout=0.2), solver=ti.Anderson(max_steps=5), gradient=ti.UnrolledPhantom())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = functional.cross_entropy(model(torch.rand(4, 1, 8, 8)), torch.tensor([0, 1, 2, 0]))
    loss.backward()
    assert {z.dtype for z in model.equilibrium.solution.value} == {torch.float32}
    assert all(p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"channels": (4, 6)}, "multiple of 4"),
        ({"head_channels": (2,)}, "each of the 2 branches"),
        ({"blocks": (1, 1, 1)}, "each of the 2 branches"),
        ({"dropout": 1.0}, "dropout"),
        ({"expansion": 0}, "expansion"),
        ({"channels": (5, 5), "groups": 5}, "an even number of groups"),
    ],
)
def test_sizes_that_make_no_sense(changes, words):
    with pytest.raises(ValueError, match=words):
        miniature(**{"groups": 4, **changes})


def reference_tensors():
    """What a checkpoint of MDEQ-Tiny from locuslab's ``deq`` repository holds, with numbers of its own."""
    norm = ("weight", "bias")
    batch_norm = ("running_mean", "running_var", "num_batches_tracked")
    names = ["downsample.0.weight", "downsample.3.weight"]
    names += [f"downsample.{i}.{part}" for i in (1, 4) for part in norm + batch_norm]
    for i in (0, 1):
        block = f"fullstage.branches.{i}.blocks.0"
        names += [f"{block}.conv{k}.weight_{part}" for k in (1, 2) for part in "gv"]
        names += [f"{block}.gn{k}.{part}" for k in (1, 2, 3) for part in norm]
        names += [f"fullstage.post_fuse_layers.{i}.conv.weight_{part}" for part in "gv"]
        wide = f"incre_modules.{i}.0"
        names += [f"{wide}.conv{k}.weight" for k in (1, 2, 3)] + [f"{wide}.downsample.0.weight"]
        names += [f"{wide}.bn{k}.{part}" for k in (1, 2, 3) for part in batch_norm]
        names += [f"{wide}.downsample.1.{part}" for part in norm + batch_norm]
    for net in ("fuse_layers.0.1.net", "fuse_layers.1.0.net.0"):
        names += [f"fullstage.{net}.{part}" for part in ("conv.weight", "gnorm.weight", "gnorm.bias")]
    for merged in ("downsamp_modules.0", "final_layer"):
        names += [f"{merged}.0.{part}" for part in norm]
        names += [f"{merged}.1.{part}" for part in norm + batch_norm]
    return [*names, "classifier.weight", "classifier.bias"]


def test_the_reference_implementation_names_every_tensor():
    """Run beside the reference code (November 2026), the map of Tiny, Large and ImageNet-Small agrees to rounding."""
    model = MDEQ(mdeq_tiny())
    homes = model.state_dict()
    renamed = ti.nn.convert_state_dict(
        {name: torch.full((1,), float(i)) for i, name in enumerate(reference_tensors())}, model
    )
    assert renamed.keys() == homes.keys()
    assert len(homes) == 94
    theirs = dict(zip(reference_tensors(), range(94), strict=True))
    for ours, name in {
        "stem.3.weight": "downsample.3.weight",
        "equilibrium.cell.branches.1.first.norm2.bias": "fullstage.branches.1.blocks.0.gn2.bias",
        "equilibrium.cell.paths.0to1.0.weight": "fullstage.fuse_layers.1.0.net.0.conv.weight",
        "equilibrium.cell.paths.1to0.1.bias": "fullstage.fuse_layers.0.1.net.gnorm.bias",
        "head.widen.1.body.4.running_var": "incre_modules.1.0.bn2.running_var",
    }.items():
        assert renamed[ours].item() == theirs[name]


def test_the_older_reference_and_the_zoo_name_the_cell_otherwise():
    model = MDEQ(mdeq_tiny())
    renamed = ti.nn.convert_state_dict({name: torch.ones(1) for name in reference_tensors()}, model)
    older = {f"module.{name}": torch.ones(1) for name in reference_tensors()}
    older |= {name.replace("fullstage", "deq.func"): value for name, value in older.items() if "fullstage" in name}
    older |= {name.replace("fullstage", "fullstage_copy"): torch.zeros(1) for name in older if ".fullstage" in name}
    zoo = {name.replace("fullstage", "full_stage"): torch.ones(1) for name in reference_tensors()}
    for other in (older, zoo):
        assert ti.nn.convert_state_dict(other, model).keys() == renamed.keys()
