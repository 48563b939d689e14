import copy

import pytest
import torch
from cells import assert_all_close, gradients, unrolled
from torch import nn
from torch.nn.utils import parametrizations as theirs
from torch.nn.utils import parametrize

from torchimplicit.nn import Equilibrium, apply_norm, remove_norm, spectral_norm, weight_norm


class Network(nn.Module):
    """One of each kind of layer, around a cell."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 4)
        self.encoder = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
        self.cell = nn.ModuleDict(
            {
                "conv": nn.Conv2d(3, 4, 3),
                "up": nn.ConvTranspose2d(3, 4, 3),
                "attention": nn.MultiheadAttention(4, 2),
                "apart": nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
                "norm": nn.LayerNorm(4),
                "rnn": nn.GRU(4, 4),
            }
        )


WEIGHTS = {
    "encoder.0.weight": 0,
    "cell.conv.weight": 0,
    "cell.up.weight": 1,
    "cell.attention.in_proj_weight": 0,
    "cell.attention.out_proj.weight": 0,
    "cell.apart.q_proj_weight": 0,
    "cell.apart.k_proj_weight": 0,
    "cell.apart.v_proj_weight": 0,
    "cell.apart.out_proj.weight": 0,
}


def normalized(model):
    return {
        f"{where}.{name}".lstrip("."): chain[0].dim
        for where, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for name, chain in module.parametrizations.items()
    }


def plain_state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model, state):
    now = model.state_dict()
    assert list(now) == list(state)
    for name, value in state.items():
        assert torch.equal(now[name], value), name


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_every_layer_that_multiplies_its_input_is_normalized_along_its_outputs(norm):
    model = Network()
    assert apply_norm(model, norm) is model
    assert normalized(model) == WEIGHTS


def test_options_reach_the_norm_and_a_misspelled_one_changes_nothing():
    model = Network()
    state = plain_state(model)
    with pytest.raises(TypeError, match="unexpected keyword argument 'targt'"):
        apply_norm(model, weight_norm, targt=0.5)
    assert_same_state(model, state)
    apply_norm(model, weight_norm, target=0.5)
    for name, dim in WEIGHTS.items():
        where, _, tensor = name.rpartition(".")
        lengths = getattr(model.get_submodule(where), tensor).movedim(dim, 0).flatten(1).norm(dim=1)
        torch.testing.assert_close(lengths, torch.full_like(lengths, 0.5))


@pytest.mark.parametrize("skip", ["cell", ["cell.conv", "cell.up", "cell.a*"], ("cell.*",), "c*l"])
def test_skipped_modules_and_what_is_in_them_stay_as_they_are(skip):
    assert normalized(apply_norm(Network(), skip=skip)) == {"encoder.0.weight": 0}


def test_a_single_layer_and_a_function_of_ones_own():
    def halved(module, name, dim):
        assert (name, dim) == ("weight", 0)
        return spectral_norm(module, name, bound=0.5, dim=dim)

    layer = apply_norm(nn.Linear(3, 3), halved)
    assert layer.parametrizations.weight[0].bound == 0.5


def test_an_attention_layer_computes_with_its_normalized_weights():
    layer = apply_norm(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), spectral_norm, bound=0.3).eval()
    plain = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    copied = remove_norm(copy.deepcopy(layer))
    plain.load_state_dict(copied.state_dict())
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(layer(x), plain(x))
    with torch.no_grad():  # the fused kernels of inference
        torch.testing.assert_close(layer(x), plain(x))
    assert torch.linalg.matrix_norm(plain.self_attn.in_proj_weight, 2).item() == pytest.approx(0.3, rel=1e-3)


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (lambda m: m, {"skip": "embd"}, "skip names 'embd', but Network has no such module"),
        (lambda m: m, {"skip": ["cell", "encoder"]}, "no linear layer, convolution or attention in Network"),
        (lambda m: weight_norm(m.encoder[0]), {}, "encoder.0.weight already has a parametrization"),
        (lambda m: theirs.orthogonal(m.cell["conv"]), {}, "cell.conv.weight already has a parametrization"),
        (lambda m: nn.init.zeros_(m.cell["up"].weight), {}, r"a zero vector along dimension 1.* \(in cell.up\)"),
        (lambda m: m.register_module("late", nn.LazyLinear(2)), {}, r"has no shape yet.* \(in late\)"),
        (lambda m: m.register_module("head", tied(m.embed)), {}, "embed.weight and head.weight are one parameter"),
        (lambda m: m.register_module("again", tied(m.encoder[0])), {}, "encoder.0.weight and again.weight are one"),
        (lambda m: m.register_module("head", tied(m.embed)), {"skip": "embed"}, "are one parameter"),
    ],
)
def test_what_cannot_be_normalized_is_said_and_changes_nothing(prepare, options, message):
    model = Network()
    prepare(model)
    names = list(model.state_dict())
    parameters = [id(p) for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        apply_norm(model, **options)
    assert list(model.state_dict()) == names
    assert [id(p) for p in model.parameters()] == parameters


def tied(other):
    layer = nn.Linear(*other.weight.shape[::-1], bias=False)
    layer.weight = other.weight
    return layer


def test_a_tied_weight_may_be_skipped_everywhere():
    model = Network()
    model.head = tied(model.embed)
    apply_norm(model, skip="head")
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("norm", "options"),
    [
        (weight_norm, {}),
        (weight_norm, {"target": 0.7, "clip": 0.9}),
        (spectral_norm, {"bound": 0.7, "iterations": 1}),
        (spectral_norm, {"scale": True, "paired": True}),
    ],
)
def test_removal_leaves_the_weights_of_eval_mode_as_parameters(norm, options, training):
    model = Network().double()
    plain = plain_state(model)
    model.cell["conv"].weight.requires_grad_(False)
    apply_norm(model, norm, **options).train(training)
    with torch.no_grad():  # the vectors do not belong to the weights any more
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.eval()
    wanted = dict(weights(model))
    model.train(training)
    assert remove_norm(model) is model
    assert model.training == training
    assert list(model.state_dict()) == list(plain)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in Network().named_parameters()]
    for name, value in weights(model):
        assert torch.equal(value, wanted[name]), name
    assert not model.cell["conv"].weight.requires_grad
    assert model.cell["up"].weight.requires_grad
    assert type(model.cell["up"]) is nn.ConvTranspose2d


def weights(model):
    for name in WEIGHTS:
        where, _, tensor = name.rpartition(".")
        yield name, getattr(model.get_submodule(where), tensor).detach().clone()


def test_an_optimizer_goes_on_with_the_one_parameter_of_a_norm_without_scale():
    layer = apply_norm(nn.Linear(3, 3), spectral_norm, bound=0.5)
    parameter = layer.parametrizations.weight.original
    assert remove_norm(layer).weight is parameter


def test_removal_leaves_other_parametrizations_alone_and_refuses_to_take_one_of_several():
    model = Network()
    theirs.orthogonal(model.encoder[0])
    apply_norm(model, skip="encoder")
    remove_norm(model)
    assert set(normalized_names(model)) == {"encoder.0.weight"}
    weight_norm(model.cell["conv"])
    spectral_norm(model.encoder[0])
    with pytest.raises(ValueError, match=r"encoder\.0\.weight has another parametrization too \(_Orthogonal\)"):
        remove_norm(model)
    assert set(normalized_names(model)) == {"encoder.0.weight", "cell.conv.weight"}


def normalized_names(model):
    for where, module in model.named_modules():
        if parametrize.is_parametrized(module):
            yield from (f"{where}.{name}" for name in module.parametrizations)


def test_a_plain_model_is_left_as_it_is():
    model = Network()
    state = plain_state(model)
    assert_same_state(remove_norm(model), state)


def test_normalize_remove_and_normalize_again():
    model = Network()
    state = plain_state(model)
    for _ in range(2):
        remove_norm(apply_norm(model))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name])


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.narrow, self.widen = nn.Linear(5, 3), nn.Linear(3, 5)

    def forward(self, z, x):
        return 0.7 * torch.tanh(self.widen(torch.tanh(self.narrow(z)))) + x


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("options", [{"bound": 0.9}, {"bound": 0.9, "clip": 0.8, "scale": True, "paired": True}])
def test_gradients_of_a_normalized_cell_are_those_of_unrolling(options, rowwise):
    layer = Equilibrium(apply_norm(Cell(), spectral_norm, **options).double(), rowwise=rowwise).eval()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    inputs = (x, *layer.parameters())
    z = layer(x)
    assert_all_close(gradients(z, inputs), gradients(unrolled(layer.cell, x), inputs))
    remove_norm(layer)
    torch.testing.assert_close(layer(x), z)


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_removal_from_a_deep_copy_leaves_the_original_normalized(norm):
    model = apply_norm(Cell(), norm).eval()
    x = torch.randn(2, 5)
    expected = model(x, x)
    twin = remove_norm(copy.deepcopy(model))
    torch.testing.assert_close(twin(x, x), expected)
    torch.testing.assert_close(model(x, x), expected)
    assert set(normalized_names(model)) == {"narrow.weight", "widen.weight"}
    assert not set(normalized_names(twin))
