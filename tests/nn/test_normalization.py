import copy

import pytest
import torch
from cells import TanhCell, assert_all_close, gradients, second_derivatives, unrolled
from torch import nn
from torch.nn.utils import parametrizations as theirs
from torch.nn.utils import parametrize

from torchimplicit.nn import Equilibrium, normalization, spectral_norm, weight_norm


class Normalized(nn.Module):
    """A tanh cell whose recurrent weight is normalized by ``norm``."""

    def __init__(self, norm):
        super().__init__()
        self.recurrent = norm(nn.Linear(5, 5))
        self.input = nn.Linear(5, 5)

    def forward(self, z, x):
        return torch.tanh(0.5 * self.recurrent(z) + self.input(x))


def by_hand(cell, weight, x, steps=200):
    z = torch.zeros_like(x)
    for _ in range(steps):
        z = torch.tanh(0.5 * (z @ weight.mT + cell.recurrent.bias) + cell.input(x))
    return z


def spectral_weight(cell, bound=1.0):
    chain = cell.recurrent.parametrizations.weight
    sigma = torch.linalg.vector_norm(chain.original @ chain[0].right.clone())
    return bound * chain.original / sigma


def length_weight(cell):
    chain = cell.recurrent.parametrizations.weight
    g, v = chain.original0, chain.original1
    return g * v / (v**2).sum(dim=1, keepdim=True).sqrt()


@pytest.fixture
def x():
    return torch.randn(3, 5, dtype=torch.float64, requires_grad=True)


def counted(monkeypatch, kind):
    calls = []
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args: calls.append(1) or forward(self, *args))
    return calls


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("norm", "weight"), [(weight_norm, length_weight), (spectral_norm, spectral_weight)])
def test_first_and_second_derivatives_are_those_by_hand(x, norm, weight, training):
    layer = Equilibrium(Normalized(norm).double()).train(training)
    inputs = (x, *layer.parameters())
    z = layer(x)
    assert_all_close(gradients(z, inputs), gradients(by_hand(layer.cell, weight(layer.cell), x), inputs))
    z = layer(x)
    expected = second_derivatives(by_hand(layer.cell, weight(layer.cell), x), x, inputs)
    assert_all_close(second_derivatives(z, x, inputs), expected)


@pytest.mark.parametrize(
    ("norm", "kind"), [(weight_norm, normalization.WeightNorm), (spectral_norm, normalization.SpectralNorm)]
)
@pytest.mark.parametrize("rowwise", [False, True])
def test_weights_are_computed_once_a_solve_and_not_in_the_backward_pass(x, norm, kind, rowwise, monkeypatch):
    layer = Equilibrium(Normalized(norm).double(), rowwise=rowwise)
    calls = counted(monkeypatch, kind)
    z = layer(x)
    assert layer.solution.evaluations > 3
    assert len(calls) == 1
    z.sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("norm", [theirs.weight_norm, theirs.spectral_norm, theirs.orthogonal])
def test_parametrizations_of_pytorch_are_computed_once_a_solve_too(x, norm):
    layer = Equilibrium(Normalized(norm).double())
    chain = layer.cell.recurrent.parametrizations.weight
    calls = []
    chain[0].register_forward_hook(lambda *_: calls.append(1))
    z = layer(x)
    assert len(calls) == 1
    layer.eval()
    inputs = (x, *layer.parameters())
    assert_all_close(gradients(layer(x), inputs), gradients(unrolled(layer.cell, x), inputs))
    assert z.shape == x.shape


def test_the_values_are_those_of_pytorch():
    linear = nn.Linear(7, 4).double()
    ours, other = weight_norm(copy.deepcopy(linear)), theirs.weight_norm(copy.deepcopy(linear))
    torch.testing.assert_close(ours.weight, other.weight)
    torch.testing.assert_close(ours.weight, linear.weight)
    ours = spectral_norm(copy.deepcopy(linear), iterations=200)
    torch.testing.assert_close(ours.weight, linear.weight / torch.linalg.matrix_norm(linear.weight, 2))
    other = theirs.spectral_norm(copy.deepcopy(linear), n_power_iterations=200)
    torch.testing.assert_close(ours.weight, other.weight)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("module", [nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(3, 4, 3), nn.Conv1d(3, 4, 2)])
def test_kernels(module, dim):
    module = copy.deepcopy(module).double()
    torch.testing.assert_close(weight_norm(copy.deepcopy(module), dim=dim).weight, module.weight)
    normalized = spectral_norm(copy.deepcopy(module), dim=dim, bound=0.7, iterations=300).weight
    matrix = normalized.movedim(dim, 0).flatten(1)
    torch.testing.assert_close(torch.linalg.matrix_norm(matrix, 2).item(), 0.7, rtol=1e-6, atol=0)


def test_only_above_leaves_small_weights_alone():
    small, large = nn.Linear(4, 4), nn.Linear(4, 4)
    with torch.no_grad():
        small.weight.mul_(0.1 / torch.linalg.matrix_norm(small.weight, 2))
        large.weight.mul_(9 / torch.linalg.matrix_norm(large.weight, 2))
    before = small.weight.clone()
    assert torch.equal(spectral_norm(small, bound=0.5, only_above=True).weight, before)
    large = spectral_norm(large, bound=0.5, only_above=True, iterations=100)
    assert torch.linalg.matrix_norm(large.weight, 2).item() == pytest.approx(0.5, rel=1e-4)


def test_the_power_method_improves_once_a_forward_pass_in_training_and_never_in_eval(x):
    layer = Equilibrium(Normalized(lambda m: spectral_norm(m, iterations=1)).double())
    norm = layer.cell.recurrent.parametrizations.weight[0]
    with torch.no_grad():
        norm.right.copy_(torch.ones(5).double() / 5**0.5)
        weight = layer.cell.recurrent.parametrizations.weight.original
        expected = torch.nn.functional.normalize(weight.mT @ (weight @ norm.right), dim=0)
    z = layer(x)
    torch.testing.assert_close(norm.right, expected)
    z.sum().backward()
    torch.testing.assert_close(norm.right, expected)
    layer.eval()
    layer(x).sum().backward()
    torch.testing.assert_close(norm.right, expected)


def test_two_forward_passes_before_a_backward_pass(x):
    layer = Equilibrium(Normalized(lambda m: spectral_norm(m, iterations=1)).double())
    with torch.no_grad():
        layer.cell.recurrent.parametrizations.weight[0].right.copy_(torch.ones(5).double() / 5**0.5)
    inputs = (x, *layer.parameters())
    first = layer(x)
    expected = gradients(by_hand(layer.cell, spectral_weight(layer.cell), x), inputs)
    layer(2 * x)
    assert_all_close(gradients(first, inputs), expected)


def test_the_weight_may_change_between_forward_and_backward_pass_without_harm(x):
    layer = Equilibrium(Normalized(weight_norm).double())
    inputs = (x, *layer.parameters())
    z = layer(x)
    expected = gradients(layer(x), inputs)
    layer.cell.recurrent.parametrizations.weight.original0.data.mul_(1.0)
    assert_all_close(gradients(z, inputs), expected)


def test_state_dict_and_deepcopy(x):
    layer = Equilibrium(Normalized(spectral_norm).double())
    layer(x).sum().backward()
    other = Equilibrium(Normalized(spectral_norm).double())
    other.load_state_dict(layer.state_dict())
    twin = copy.deepcopy(layer)
    for module in (other, twin, layer):
        module.eval()
    assert torch.equal(other(x), layer(x))
    assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_remove_parametrizations_leaves_the_normalized_weight(norm):
    module = norm(nn.Linear(4, 4)).eval()
    before = module.weight.clone()
    parametrize.remove_parametrizations(module, "weight")
    assert torch.equal(module.weight, before)
    assert isinstance(module.weight, nn.Parameter)


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_the_weight_can_be_assigned(norm):
    module = norm(nn.Linear(4, 4))
    module.weight = torch.eye(4)
    assert torch.allclose(module.weight, torch.eye(4))


def test_a_whole_module_is_not_pickled_and_pytorch_says_so():
    import pickle

    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(weight_norm(nn.Linear(2, 2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype):
    module = spectral_norm(nn.Linear(8, 8), bound=0.5).to(dtype)
    assert module.weight.dtype == dtype
    assert torch.linalg.matrix_norm(module.weight.float(), 2).item() == pytest.approx(0.5, rel=0.05)


def test_the_singular_value_is_not_computed_in_autocasts_precision():
    module = spectral_norm(nn.Linear(8, 8)).eval()
    expected = module.weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module.weight, expected)


def test_weights_held_for_a_solve_are_let_go_after_an_error(x):
    layer = Equilibrium(Normalized(weight_norm).double())
    with pytest.raises(Exception, match="NaN"):
        layer(x * torch.nan)
    assert "forward" not in layer.cell.recurrent.parametrizations.weight.__dict__


def test_inside_an_inner_equilibrium_they_are_computed_once_a_solve_of_the_outer_one(x, monkeypatch):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Equilibrium(Normalized(spectral_norm).double())

        def forward(self, z, x):
            return 0.3 * self.inner(z + x)

    layer = Equilibrium(Outer())
    calls = counted(monkeypatch, normalization.SpectralNorm)
    inputs = (x, *layer.parameters())
    got = gradients(layer(x), inputs)
    assert len(calls) == 1

    cell = layer.cell.inner.cell
    weight, z = spectral_weight(cell), torch.zeros_like(x)
    for _ in range(40):
        z = 0.3 * by_hand(cell, weight, z + x, steps=60)
    assert_all_close(got, gradients(z, inputs))


# The norm, its options, and the factor by which the parameter is then multiplied.
OPTIONS = [
    (weight_norm, {"target": 0.8}, lambda g, size, sigma: 0.8 / size),
    (weight_norm, {"clip": 0.9}, lambda g, size, sigma: (g / size).clamp_max(0.9)),
    (weight_norm, {"target": 0.8, "clip": 1.5}, lambda g, size, sigma: (0.8 / size).clamp_max(1.5)),
    (spectral_norm, {"bound": 0.6, "clip": 0.4}, lambda g, size, sigma: (0.6 / sigma).clamp_max(0.4)),
    (spectral_norm, {"bound": 0.6, "scale": True}, lambda g, size, sigma: g / sigma),
    (spectral_norm, {"scale": True, "clip": 0.5}, lambda g, size, sigma: (g / sigma).clamp_max(0.5)),
    (spectral_norm, {"bound": 0.6, "paired": True}, lambda g, size, sigma: 0.6 / sigma),
    (spectral_norm, {"paired": True, "scale": True, "clip": 0.5}, lambda g, size, sigma: (g / sigma).clamp_max(0.5)),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("norm", "options", "factor"), OPTIONS)
def test_options_are_the_factor_that_they_say_in_an_equilibrium(x, norm, options, factor, training):
    layer = Equilibrium(Normalized(lambda m: norm(m, **options)).double())
    chain = layer.cell.recurrent.parametrizations.weight
    with torch.no_grad():  # some rows above the clip and some below, one length negative
        for p in chain.parameters():
            p.mul_(torch.tensor([0.5, 3.0, 1.0, -0.4, 1.7], dtype=torch.float64)[:, None])
    layer.train(training)
    z = layer(x)
    w = chain.original if chain.is_tensor else chain.original1
    g = None if chain.is_tensor else chain.original0
    image = w @ chain[0].right.clone() if norm is spectral_norm else w
    sigma = chain[0].left.clone() @ image if options.get("paired") else torch.linalg.vector_norm(image)
    size = (w**2).sum(dim=1, keepdim=True).sqrt()
    inputs = (x, *layer.parameters())
    expected = gradients(by_hand(layer.cell, w * factor(g, size, sigma), x), inputs)
    assert_all_close(gradients(z, inputs), expected)


def test_a_learned_scale_has_one_entry_an_output_and_begins_at_the_bound():
    module = spectral_norm(nn.ConvTranspose2d(3, 4, 3), bound=0.7, scale=True, dim=1)
    scale = module.parametrizations.weight.original0
    assert scale.shape == (1, 4, 1, 1)
    assert torch.equal(scale, torch.full_like(scale, 0.7))


def test_paired_vectors_are_improved_the_right_one_first_and_lag_behind_in_eval():
    module = spectral_norm(nn.Linear(7, 4).double(), iterations=1, paired=True)
    norm, weight = module.parametrizations.weight[0], module.parametrizations.weight.original
    with torch.no_grad():
        norm.left.copy_(torch.ones(4).double() / 2)
        right = torch.nn.functional.normalize(weight.mT @ norm.left, dim=0)
        left = torch.nn.functional.normalize(weight @ right, dim=0)
        torch.testing.assert_close(module.weight, weight / (left @ weight @ right))
        torch.testing.assert_close(norm.right, right)
        torch.testing.assert_close(norm.left, left)
        weight += 0.1
    other = theirs.spectral_norm(nn.Linear(7, 4).double()).eval()
    reference = other.parametrizations.weight
    reference.load_state_dict({"original": weight, "0._u": left, "0._v": right})
    torch.testing.assert_close(module.eval().weight, other.weight)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_fixed_lengths_of_kernels(dim):
    weight = weight_norm(nn.Conv2d(3, 4, 3).double(), dim=dim, target=0.3).weight
    lengths = weight.movedim(dim, 0).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.3))


def test_normalizations_that_would_be_nan_are_refused():
    linear = nn.Linear(3, 3)
    with torch.no_grad():
        linear.weight[1] = 0
    with pytest.raises(ValueError, match="a zero vector along dimension 0"):
        weight_norm(linear)
    weight_norm(copy.deepcopy(linear), dim=1)
    nn.init.zeros_(linear.weight)
    for options in ({}, {"scale": True}, {"clip": 1.0, "paired": True}):
        with pytest.raises(ValueError, match="no entry but zeros"):
            spectral_norm(linear, **options)
    assert torch.equal(spectral_norm(linear, only_above=True).weight, torch.zeros(3, 3))


def test_the_result_of_a_hook_is_not_normalized_again():
    with pytest.warns(FutureWarning):
        linear = nn.utils.weight_norm(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="remove that one first"):
        weight_norm(linear)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: weight_norm(nn.ReLU()), "ReLU has no parameter 'weight'"),
        (lambda: spectral_norm(nn.Linear(2, 2), name="wight"), "no parameter 'wight'"),
        (lambda: spectral_norm(nn.Linear(2, 2), name="bias"), "must be a matrix or a kernel"),
        (lambda: spectral_norm(nn.Linear(2, 2), bound=0.0), "positive finite number"),
        (lambda: spectral_norm(nn.Linear(2, 2), iterations=0), "iterations"),
        (lambda: spectral_norm(nn.Linear(2, 2), dim=2), "no dimension 2"),
        (lambda: weight_norm(nn.Linear(2, 2), dim=-3), "no dimension -3"),
        (lambda: weight_norm(nn.Linear(2, 2), target=0), "target is 0, but must be a positive"),
        (lambda: weight_norm(nn.Linear(2, 2), clip=float("inf")), "clip is inf, but must be a positive finite"),
        (lambda: spectral_norm(nn.Linear(2, 2), clip=-1.0), "clip is -1.0, but must be a positive finite"),
        (lambda: spectral_norm(nn.Linear(2, 2), only_above=True, clip=2.0), "only_above=True means clip=1"),
        (lambda: weight_norm(nn.LazyLinear(2)), "has no shape yet"),
        (lambda: weight_norm(spectral_norm(nn.Linear(2, 2))), "must be the first: use target="),
        (lambda: spectral_norm(spectral_norm(nn.Linear(2, 2)), scale=True), "must be the first: use scale=False"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_plain_cell_is_untouched():
    assert not list(normalization.parametrizations(TanhCell()))
