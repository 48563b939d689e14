"""Implicit representations and their explicit twins."""

import math

import pytest
import torch
from torch import nn

import torchimplicit as ti
from torchimplicit.models import MFN, SIREN, ImplicitMFN, ImplicitSIREN
from torchimplicit.models.representations.filters import GaborFilter
from torchimplicit.nn import WarmStart

KINDS = {
    "siren": (ImplicitSIREN, SIREN, {}),
    "fourier": (ImplicitMFN, MFN, {"filter": "fourier"}),
    "gabor": (ImplicitMFN, MFN, {"filter": "gabor"}),
}
EXACT = {
    "solver": ti.Anderson(rtol=1e-13),
    "gradient": ti.Implicit(linear_solver=ti.GMRES(rtol=1e-13)),
}


@pytest.fixture(autouse=True)
def _seeded(one_thread):
    torch.manual_seed(0)


def implicit(kind, depth=1, width=7, scale=6.0, **options):
    make, _, given = KINDS[kind]
    return make(2, 3, width, depth, scale, **given, **{**EXACT, **options}).double()


def explicit(kind, depth=1, width=7, scale=6.0):
    _, make, given = KINDS[kind]
    return make(2, 3, width, depth, scale, **given).double()


def points(count=5):
    return torch.rand(count, 2, dtype=torch.float64) * 2 - 1


def iterated(model, x, steps=400):
    """The plain iteration, with its tape."""
    given = [one(x) for one in model.filters]
    z = torch.zeros_like(given[0])
    for _ in range(steps):
        z = model.equilibrium.cell(z, given)
    return model.head(z)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("depth", "width"), [(1, 7), (4, 5), (1, 14)])
def test_twins_have_the_same_parameters(kind, depth, width):
    counts = [
        sum(p.numel() for p in model.parameters())
        for model in (implicit(kind, depth, width), explicit(kind, depth, width))
    ]
    assert counts[0] == counts[1]
    extra = 3 * width if kind == "gabor" else 0
    assert counts[0] == (depth + 1) * (3 * width + extra) + depth * (width * width + width) + 3 * width + 3


@pytest.mark.parametrize("kind", KINDS)
def test_twins_begin_alike(kind):
    made = []
    for make in (implicit, explicit):
        torch.manual_seed(3)
        made.append(make(kind, depth=2))
    one, other = made
    x = points()
    for a, b in zip(one.filters, other.filters, strict=True):
        torch.testing.assert_close(a(x), b(x))
    for a, b in zip(one.equilibrium.cell.layers, other.cell.layers, strict=True):
        torch.testing.assert_close(a.parametrizations.weight.original, b.weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 3])
def test_the_value_is_the_fixed_point(kind, depth):
    model, x = implicit(kind, depth).eval(), points()
    torch.testing.assert_close(model(x), iterated(model, x), rtol=1e-10, atol=1e-11)
    assert model.equilibrium.solution.converged.all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_explicit_model_is_its_cell_applied_to_zero(kind):
    model, x = explicit(kind, depth=3), points()
    given = [one(x) for one in model.filters]
    torch.testing.assert_close(model(x), model.head(model.cell(torch.zeros_like(given[0]), given)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 2])
def test_the_cell_contracts_whatever_the_weights(kind, depth):
    model, x = implicit(kind, depth), points(20)
    with torch.no_grad():
        for layer in model.equilibrium.cell.layers:
            layer.parametrizations.weight.original.mul_(40).add_(torch.randn(7, 7))
        for one in model.filters:
            if isinstance(one, GaborFilter):
                one.gamma.mul_(-2)
        model.equilibrium(tuple(one(x) for one in model.filters))
        for _ in range(20):  # the power method follows
            [layer.weight for layer in model.equilibrium.cell.layers]
        model.eval()
        for layer in model.equilibrium.cell.layers:
            assert torch.linalg.matrix_norm(layer.weight, 2) <= 0.97 * (1 + 1e-6)
        given = [one(x) for one in model.filters]
        a, b = torch.randn(2, 20, 7, dtype=torch.float64)
        gap = (model.equilibrium.cell(a, given) - model.equilibrium.cell(b, given)).norm(dim=1)
    assert (gap <= 0.97**depth * (1 + 1e-6) * (a - b).norm(dim=1)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 2])
def test_gradients_agree_with_finite_differences(kind, depth):
    model, x = implicit(kind, depth, width=4, scale=3.0), points(3).requires_grad_()
    model.eval()  # the power method's vectors stay
    names = [name for name, _ in model.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in model.parameters()]

    def value(x, *weights):
        return torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(value, (x, *values), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_first_and_second_derivatives_in_the_coordinates_are_exact(kind):
    model, x = implicit(kind, depth=2, scale=3.0), points(4).requires_grad_()
    model.eval()

    def derivatives(value):
        (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        seconds = [torch.autograd.grad(first[:, i].sum(), x, retain_graph=True)[0] for i in range(2)]
        weights = torch.autograd.grad((first**2).sum(), list(model.parameters()), allow_unused=True)
        return [first, *seconds, *(g for g in weights if g is not None)]

    for got, expected in zip(derivatives(model(x)), derivatives(iterated(model, x)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_derivative_through_the_one_step_estimate_raises(kind):
    model, x = implicit(kind, gradient=ti.OneStep()), points().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(ti.UnsupportedDerivativeError):
        slope.square().sum().backward()


def test_the_one_step_estimate_points_elsewhere_for_a_loss_on_slopes():
    """What raises when asked of the estimator: dL/dW of an eikonal loss, were it taken through one application of the
    cell at the detached state."""
    model = implicit("siren", width=24, scale=6.0)
    model.eval()
    x = points(64).requires_grad_()

    def eikonal(value):
        (slope,) = torch.autograd.grad(value[:, 0].sum(), x, create_graph=True)
        loss = (slope.norm(dim=1) - 1).square().mean()
        return torch.autograd.grad(loss, model.equilibrium.cell.layers[0].parametrizations.weight.original)[0]

    given = [one(x) for one in model.filters]
    z = model.equilibrium(given).detach()
    reattached = eikonal(model.head(model.equilibrium.cell(z, given)))
    exact, reference = eikonal(model(x)), eikonal(iterated(model, x))
    cosine = nn.functional.cosine_similarity
    assert cosine(exact.flatten(), reference.flatten(), dim=0) > 1 - 1e-9
    assert cosine(reattached.flatten(), reference.flatten(), dim=0) < 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_a_carried_state_evaluates_the_cell_once_a_step(kind):
    model = implicit(kind, gradient=ti.NeumannPhantom(steps=2, damping=1.0), warm_start=WarmStart(refresh=1))
    x = points(6)
    for step in range(3):
        model(x).sum().backward()
        assert (model.equilibrium.solution.evaluations == 1) == (step > 0)


def test_points_keep_their_states_in_chunks():
    model = implicit("fourier", warm_start=WarmStart(samples=6, refresh=1))
    x = points(6)
    whole = implicit("fourier")
    whole.load_state_dict(model.state_dict())
    for _ in range(2):
        for part in (torch.tensor([4, 0, 2]), torch.tensor([1, 5, 3])):
            torch.testing.assert_close(model(x[part], part), whole(x)[part], rtol=1e-9, atol=1e-10)
    model.eval()
    torch.testing.assert_close(model(x), whole(x), rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_initial_values_are_as_stated():
    width, depth, scale = 4000, 3, 50.0
    torch.manual_seed(1)
    model = MFN(2, 1, width, depth, scale, "fourier")
    bound = scale / math.sqrt(depth + 1) / math.sqrt(2)
    weight, phase = model.filters[1].phase.weight, model.filters[1].phase.bias
    assert weight.abs().max() <= bound
    assert weight.abs().mean() == pytest.approx(bound / 2, rel=0.05)
    assert phase.abs().max() <= math.pi
    assert phase.abs().mean() == pytest.approx(math.pi / 2, rel=0.05)
    assert model.cell.layers[0].weight.abs().max() <= 1 / math.sqrt(width)
    assert model.cell.layers[0].weight.std() == pytest.approx(1 / math.sqrt(3 * width), rel=0.05)


@torch.no_grad()
def test_windows_begin_as_stated():
    window = GaborFilter(2, 20000, 50.0, 2, (-1.0, 0.0), (1.0, 3.0), alpha=3.0)
    assert window.gamma.mean() == pytest.approx(1.0, rel=0.05)
    assert window.gamma.var() == pytest.approx(1.0, rel=0.1)
    assert window.mu.amin(0).tolist() == pytest.approx([-1, 0], abs=0.01)
    assert window.mu.amax(0).tolist() == pytest.approx([1, 3], abs=0.01)
    ratio = window.phase.weight.detach().square().mean(1) / window.gamma
    assert torch.corrcoef(torch.stack([ratio, window.gamma.detach()]))[0, 1].abs() < 0.05


def test_a_window_is_as_written():
    window = GaborFilter(3, 5, 2.0, 1, (-1,) * 3, (1,) * 3, alpha=3.0).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    square = ((x[:, None] - window.mu) ** 2).sum(-1)
    torch.testing.assert_close(window(x), torch.sin(window.phase(x)) * torch.exp(-0.5 * window.gamma * square))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SIREN(2, 1, 0), "width"),
        (lambda: ImplicitSIREN(2, 1, 4, depth=0), "depth"),
        (lambda: MFN(2, 1, 4, scale=-1.0), "scale"),
        (lambda: MFN(2, 1, 4, filter="wavelet"), "filter"),
        (lambda: ImplicitMFN(2, 1, 4, filter="gabor", alpha=0.0), "alpha"),
        (lambda: ImplicitMFN(2, 1, 4, filter="gabor", low=(0.0,)), "corners"),
        (lambda: SIREN(2, 1, 4)(torch.zeros(3, 3)), r"\[points, 2\]"),
    ],
)
def test_bad_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def of_layer(model):
    cell = model.cell if isinstance(model, (SIREN, MFN)) else model.equilibrium.cell
    return cell.layers[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["spectral", "frobenius", "weight", None])
def test_norms_hold_implicit_and_explicit_models_alike(kind, norm):
    *makes, given = KINDS[kind]
    orders = {"spectral": 2, "frobenius": "fro"}
    for make in makes:
        model = make(2, 3, 9, 1, 6.0, **given, norm=norm, bound=0.5).double()
        layer = of_layer(model)
        with torch.no_grad():
            original = layer.parametrizations.weight if norm else layer
            for weight in original.parameters(recurse=False):
                weight.mul_(20)
        for _ in range(30):
            model(points())
        weight = layer.weight.detach()
        if norm in orders:
            assert float(torch.linalg.matrix_norm(weight, orders[norm])) == pytest.approx(0.5, rel=1e-2)
        else:
            assert float(torch.linalg.matrix_norm(weight, 2)) > 5


def test_norms_that_are_none():
    with pytest.raises(ValueError, match="norm is 'batch'"):
        SIREN(2, 1, 4, norm="batch")
    with pytest.raises(ValueError, match="bound is 0"):
        ImplicitSIREN(2, 1, 4, bound=0)


def test_the_first_gabor_filter_has_narrower_windows():
    model = MFN(2, 1, 20000, 1, filter="gabor")
    first, other = (one.gamma.detach().mean() for one in model.filters)
    torch.testing.assert_close(first / other, torch.tensor(2.0), rtol=0.05, atol=0)
