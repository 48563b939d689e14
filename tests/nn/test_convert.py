"""Checkpoints in the forms of TorchDEQ 0.1.0 and of the deq and mdeq repositories, made here from their definitions."""

import copy

import pytest
import torch
from cells import assert_all_close, gradients
from torch import nn
from torch.nn.utils import parametrizations as theirs

from torchimplicit.nn import (
    Equilibrium,
    apply_norm,
    convert_state_dict,
    per_solve,
    remove_norm,
    spectral_norm,
    weight_norm,
)


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(6, 3, 3, padding=1)
        self.mix = nn.Linear(5, 5)
        self.norm = nn.GroupNorm(1, 3)

    def forward(self, z, x):
        return 0.4 * torch.tanh(self.norm(self.mix(self.up(torch.tanh(self.conv(z)))))) + x


LAYERS = {"conv": 0, "up": 1, "mix": 0}


class Model(nn.Module):
    """The cell, under two names."""

    def __init__(self):
        super().__init__()
        self.func = Cell()
        self.layer = Equilibrium(self.func)


def matrix(weight, dim):
    return weight.movedim(dim, 0).flatten(1)


def along(vector, weight, dim):
    return vector.view([-1 if d == dim else 1 for d in range(weight.ndim)])


def weight_normed(scale=True):
    """A state dict of TorchDEQ's weight norm with numbers of its own, and the lengths' part of each weight."""
    state = {}
    for name, value in Cell().state_dict().items():
        layer = name.partition(".")[0]
        if layer not in LAYERS or not name.endswith("weight"):
            state[name] = torch.randn_like(value)
            continue
        dim = LAYERS[layer]
        state[f"{name}_v"] = torch.randn_like(value)
        if scale:
            state[f"{name}_g"] = along(torch.rand(value.shape[dim]) + 0.2, value, dim)
    return double(state)


def spectral_normed(scale=True, stale=0.0):
    state = {}
    for name, value in Cell().state_dict().items():
        layer = name.partition(".")[0]
        if layer not in LAYERS or not name.endswith("weight"):
            state[name] = torch.randn_like(value)
            continue
        dim = LAYERS[layer]
        weight = torch.randn_like(value, dtype=torch.float64)
        u, _, vh = torch.linalg.svd(matrix(weight, dim), full_matrices=False)
        state[f"{name}_orig"] = weight + stale * torch.randn_like(weight)
        if scale:
            state[f"{name}_g"] = along(torch.rand(value.shape[dim]) + 0.2, value, dim)
        state[f"{name}_u"], state[f"{name}_v"] = u[:, 0].clone(), vh[0].clone()
    return double(state)


def double(state):
    return {name: value.double() for name, value in state.items()}


def reference(state, layer, target=1.0, clip=None):
    """The weight that TorchDEQ computes in eval mode."""
    dim, name = LAYERS[layer], f"{layer}.weight"
    g = state.get(f"{name}_g", torch.tensor(target, dtype=torch.float64))
    if f"{name}_orig" in state:
        weight = state[f"{name}_orig"]
        size = state[f"{name}_u"] @ matrix(weight, dim) @ state[f"{name}_v"]
    else:
        weight = state[f"{name}_v"]
        size = along(matrix(weight, dim).norm(dim=1), weight, dim)
    factor = g / size
    return weight * (factor if clip is None else torch.minimum(torch.full_like(factor, clip), factor))


def plain_cell(state, **options):
    cell = Cell().double()
    for layer in LAYERS:
        state = state | {f"{layer}.weight": reference(state, layer, **options)}
    cell.load_state_dict({name: state[name] for name in cell.state_dict()})
    return cell


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def assert_loads(model, state, cell, expected):
    before = {name: value.clone() for name, value in state.items()}
    model.load_state_dict(convert_state_dict(state, model))
    assert set(state) == set(before)
    assert all(torch.equal(value, before[name]) for name, value in state.items())
    for layer in LAYERS:
        torch.testing.assert_close(getattr(cell, layer).weight, getattr(expected, layer).weight)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert_all_close(gradients(cell(x, x), [x]), gradients(expected(x, x), [x]))


OPTIONS = [({}, None), ({"target": 0.7}, None), ({}, 0.4), ({"target": 0.7}, 0.3)]


@pytest.mark.parametrize(("fixed", "clip"), OPTIONS)
def test_weight_norms_of_torchdeq(fixed, clip):
    state = weight_normed(scale=not fixed)
    model = Model().double()
    apply_norm(model.func, weight_norm, **fixed, clip=clip)
    assert_loads(model, prefixed(state, "func."), model.func, plain_cell(state, **fixed, clip=clip))
    assert model.func is model.layer.cell
    remove_norm(model)
    torch.testing.assert_close(model.func.up.weight, reference(state, "up", **fixed, clip=clip))


@pytest.mark.parametrize("stale", [0.0, 0.3])
@pytest.mark.parametrize(("fixed", "clip"), OPTIONS)
def test_spectral_norms_of_torchdeq(fixed, clip, stale, recwarn):
    state = spectral_normed(scale=not fixed, stale=stale)
    model = Model().double()
    own = {"bound": fixed["target"]} if fixed else {"scale": True}
    apply_norm(model.func, spectral_norm, clip=clip, paired=True, iterations=1, **own).eval()
    assert_loads(model, prefixed(state, "func."), model.func, plain_cell(state, **fixed, clip=clip))
    assert not recwarn.list


def test_spectral_norms_of_torchdeq_in_training_take_one_power_iteration_a_step():
    state = spectral_normed(stale=0.3)
    cell = apply_norm(Cell().double(), spectral_norm, scale=True, paired=True, iterations=1)
    cell.load_state_dict(convert_state_dict(state, cell))
    cell.train()
    for _ in range(3):
        for layer, dim in LAYERS.items():
            name = f"{layer}.weight"
            weight = matrix(state[f"{name}_orig"], dim)
            state[f"{name}_v"] = torch.nn.functional.normalize(weight.T @ state[f"{name}_u"], dim=0)
            state[f"{name}_u"] = torch.nn.functional.normalize(weight @ state[f"{name}_v"], dim=0)
            torch.testing.assert_close(getattr(cell, layer).weight, reference(state, layer))


def test_spectral_norms_without_the_left_vector_agree_where_it_belongs_to_the_weight(recwarn):
    state = spectral_normed()
    cell = apply_norm(Cell().double(), spectral_norm, scale=True).eval()
    assert_loads(cell, state, cell, plain_cell(state))
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"paired=True\) gives the saved model's value") as caught:
        cell.load_state_dict(convert_state_dict(spectral_normed(stale=0.3), cell))
    assert caught[0].filename == __file__


@pytest.mark.parametrize("norm", ["weight", "spectral"])
def test_gradients_of_the_checkpoints_own_parameters_are_those_of_its_formula(norm):
    state = weight_normed() if norm == "weight" else spectral_normed(stale=0.3)
    cell = Cell().double()
    if norm == "weight":
        apply_norm(cell)
    else:
        apply_norm(cell, spectral_norm, scale=True, paired=True)
    cell.eval().load_state_dict(convert_state_dict(state, cell))
    leaves = {name: value.clone().requires_grad_() for name, value in state.items() if not name.endswith("_u")}
    if norm == "spectral":
        leaves.update({name: leaves[name].detach() for name in leaves if name.endswith("_v")})
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    weights = {f"{layer}.weight": reference({**state, **leaves}, layer) for layer in LAYERS}
    rest = {name: value for name, value in leaves.items() if name in dict(Cell().named_parameters())}
    z = torch.func.functional_call(Cell(), {**rest, **weights}, (x, x))
    wrt = [leaves[f"{layer}.weight_{part}"] for layer in LAYERS for part in ("g", "v" if norm == "weight" else "orig")]
    chains = [getattr(cell, layer).parametrizations.weight for layer in LAYERS]
    ours = [p for chain in chains for p in (chain.original0, chain.original1)]
    assert_all_close(gradients(cell(x, x), ours), gradients(z, wrt))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_what_the_older_code_stored_twice_and_the_prefixes_of_wrappers_go(prefix):
    state = weight_normed()
    model = Model().double()
    apply_norm(model.func)
    copied = plain_cell(weight_normed()).state_dict()
    old = prefixed(state, "func.") | prefixed(copied, "func_copy.")
    old |= prefixed(state, "deq.func.") | prefixed(copied, "deq.func_copy.")
    assert_loads(model, prefixed(old, prefix), model.func, plain_cell(state))


def test_a_second_copy_with_other_values_is_not_thrown_away():
    state = weight_normed()
    model = apply_norm(Cell().double())
    state["deq.mix.bias"] = state["mix.bias"] + 1
    with pytest.raises(RuntimeError, match=r"deq\.mix\.bias"):
        model.load_state_dict(convert_state_dict(state, model))


def test_only_the_equilibrium_has_the_cell_in_the_model():
    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Equilibrium(apply_norm(Cell()))

    state, model = weight_normed(), Only().double()
    old = prefixed(state, "func.")
    with pytest.raises(RuntimeError, match=r"func\.mix\.bias"):
        model.load_state_dict(convert_state_dict(old, model))
    model.load_state_dict(convert_state_dict(old, model, rename={"func.": "layer.cell."}))
    torch.testing.assert_close(model.layer.cell.mix.weight, reference(state, "mix"))
    with pytest.raises(ValueError, match=r"no key begins with 'fnc\.'"):
        convert_state_dict(old, model, rename={"fnc.": "layer.cell."})
    with pytest.raises(ValueError, match=r"two keys become 'mix\.bias'"):
        convert_state_dict({**state, "a.bias": state["mix.bias"] + 1}, model, rename={"a.": "mix."})


def test_a_checkpoint_that_has_both_names_may_not_contradict_itself():
    state, model = weight_normed(), Model().double()
    apply_norm(model.func)
    both = prefixed(state, "func.") | prefixed(state, "layer.cell.")
    assert_loads(model, both, model.func, plain_cell(state))
    both["layer.cell.mix.weight_g"] = both["func.mix.weight_g"] + 1
    with pytest.raises(ValueError, match="are one tensor in the model, but have different values"):
        convert_state_dict(both, model)


def test_our_own_state_dict_and_an_unnormalized_one_pass_unchanged():
    for model in (Model(), apply_norm(Model(), spectral_norm, paired=True)):
        state = model.state_dict()
        assert convert_state_dict(state, model).keys() == state.keys()
        half = {name: value for name, value in state.items() if name.startswith("func.")}
        other = copy.deepcopy(model)
        other.load_state_dict(convert_state_dict(half, other))


@pytest.mark.parametrize("hook", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_the_normalizations_of_pytorch(norm, hook):
    old = Cell().double()
    for layer in (old.conv, old.mix):
        getattr(nn.utils if hook else theirs, norm)(layer)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    old(x, x)
    old.eval()
    cell = Cell().double()
    options = {"paired": True} if norm == "spectral_norm" else {}
    apply_norm(cell, spectral_norm if options else weight_norm, skip="up", **options).eval()
    cell.load_state_dict(convert_state_dict(old.state_dict(), cell))
    torch.testing.assert_close(cell(x, x), old(x, x))


@pytest.mark.parametrize(
    ("state", "norm", "options", "message"),
    [
        (
            weight_normed,
            None,
            {},
            "conv.weight is normalized in the checkpoint .*, but not in the model: call apply_norm",
        ),
        (spectral_normed, None, {}, "conv.weight is normalized in the checkpoint"),
        (weight_normed, spectral_norm, {}, "has weight normalization in the checkpoint, but spectral normalization in"),
        (spectral_normed, weight_norm, {}, "has spectral normalization in the checkpoint, but weight normalization in"),
        (weight_normed, weight_norm, {"target": 1.0}, "normalize it with target=None"),
        (lambda: weight_normed(scale=False), weight_norm, {}, "normalize it with target= the target norm"),
        (spectral_normed, spectral_norm, {}, "normalize it with scale=True"),
        (lambda: spectral_normed(scale=False), spectral_norm, {"scale": True}, "scale=False and bound="),
        (lambda: {"state_dict": weight_normed(), "epoch": 3}, weight_norm, {}, r"pass one of them \(state_dict\)"),
        (lambda: {"epoch": 3}, weight_norm, {}, "this is not a state dict"),
        (lambda: {}, weight_norm, {}, "this is not a state dict"),
    ],
)
def test_a_checkpoint_that_does_not_fit_the_model_is_refused_in_words(state, norm, options, message):
    cell = Cell().double()
    if norm is not None:
        apply_norm(cell, norm, **options)
    with pytest.raises(ValueError, match=message):
        convert_state_dict(state(), cell)


def test_a_parameter_whose_name_ends_like_a_norms_part_is_a_parameter():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.weight_v, self.proj_g = (nn.Parameter(torch.randn(2)) for _ in range(3))

    old, new = Named(), Named()
    new.load_state_dict(convert_state_dict(old.state_dict(), new))
    assert torch.equal(new.weight_v, old.weight_v)


def test_a_converted_cell_in_a_map_for_solve():
    state, model = weight_normed(), apply_norm(Cell().double())
    model.load_state_dict(convert_state_dict(state, model))
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(per_solve(model)(x, x), plain_cell(state)(x, x))
