"""Implicit graph neural networks on made-up graphs, against dense matrices and finite differences."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import torchimplicit as ti
from torchimplicit.models import (
    IGNN,
    Adjacency,
    IdentityStart,
    IGNNConfig,
    IGNNLayer,
    InfinityNormBall,
    UniformStart,
    ignn_chains,
    ignn_ppi,
    ignn_tu,
    project_rows,
)

TIGHT = ti.FixedPointIteration(rtol=1e-14, atol=1e-14, max_steps=1000)
EXACT = {
    "implicit": ti.Implicit(linear_solver=ti.linear.GMRES(rtol=1e-13)),
    "unrolled": ti.Unrolled(),
    "unrolled phantom": ti.UnrolledPhantom(steps=200, damping=1.0),
    "neumann phantom": ti.NeumannPhantom(steps=200, damping=1.0),
}


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def chain(length):
    """The directed edges 0 -> 1 -> ... ."""
    return torch.stack([torch.arange(length - 1), torch.arange(1, length)])


def directed(nodes=6):
    """A directed graph with a cycle, an isolated node (the last) and an edge that stands there twice."""
    edges = [(0, 1), (1, 2), (2, 0), (0, 3), (3, 4), (1, 4), (1, 4)]
    return torch.tensor(edges).T, nodes


def dense(edge_index, nodes, weight=None):
    matrix = torch.zeros(nodes, nodes)
    weight = torch.ones(edge_index.shape[1]) if weight is None else weight
    return matrix.index_put_(tuple(edge_index), weight, accumulate=True)


def normalized(matrix):
    loops = matrix + torch.eye(len(matrix))
    scale = loops.sum(dim=1).rsqrt()
    return scale[:, None] * loops * scale


def by_hand(layer, u, matrix, steps=400):
    """The paper's equation in its own layout, features in dim 0, by plain iteration."""
    weight, bias = layer.equilibrium.cell.weight, 0 if layer.bias is None else layer.bias[:, None]
    injection = layer.injection.weight @ u.T @ matrix + bias
    x = torch.zeros_like(injection)
    for _ in range(steps):
        x = torch.relu(weight @ x @ matrix + injection)
    return x.T


def raw(layer):
    return layer.equilibrium.cell.parametrizations.weight.original


# the graph


@pytest.mark.parametrize("weighted", [False, True])
def test_the_normalized_adjacency_is_that_of_the_formula(weighted):
    edges, n = directed()
    weight = torch.rand(edges.shape[1]) if weighted else None
    found = Adjacency.normalized(edges, n, weight, dtype=torch.float64)
    expected = normalized(dense(edges, n, weight))
    assert torch.allclose(found.out_of.to_dense(), expected)
    assert torch.allclose(found.into.to_dense(), expected.T)


def test_it_sums_from_source_to_target():
    adjacency = Adjacency.weighted(torch.tensor([[0], [2]]), 3, torch.tensor([5.0]), dtype=torch.float64)
    x = torch.tensor([[1.0], [2.0], [3.0]])
    assert adjacency.sum_in(x).flatten().tolist() == [0.0, 0.0, 5.0]


@pytest.mark.parametrize("edges", [chain(30), directed()[0], torch.zeros(2, 0, dtype=torch.int64)])
def test_the_normalized_eigenvalue_is_one(edges):
    nodes = int(edges.max()) + 2 if edges.numel() else 3
    adjacency = Adjacency.normalized(edges, nodes, dtype=torch.float64)
    assert adjacency.perron == 1.0
    assert torch.linalg.eigvals(adjacency.out_of.to_dense()).abs().max().item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("edges", "nodes", "expected"),
    [
        (chain(200), 200, 0.0),
        (torch.cat([chain(200), torch.arange(200).expand(2, 200)], dim=1), 200, 1.0),
        (torch.zeros(2, 0, dtype=torch.int64), 3, 0.0),
        (torch.tensor([[0, 1], [1, 0]]), 2, 1.0),
        (torch.tensor([[0, 1, 1], [1, 0, 2]]), 4, 1.0),
    ],
    ids=["chain", "chain with self-loops", "no edges", "bipartite", "cycle with a tail"],
)
def test_the_perron_eigenvalue_where_it_is_known(edges, nodes, expected):
    assert Adjacency.weighted(edges, nodes).perron == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_the_perron_eigenvalue_is_never_too_small(seed):
    generator = torch.Generator().manual_seed(seed)
    n = 12
    edges = torch.randint(n, (2, 30), generator=generator)
    weight = torch.rand(30, generator=generator)
    exact = torch.linalg.eigvals(dense(edges, n, weight)).abs().max().item()
    found = Adjacency.weighted(edges, n, weight).perron
    assert exact * (1 - 1e-12) <= found <= exact * (1 + 1e-6)


def test_the_sum_over_neighbours_has_every_derivative():
    edges, n = directed()
    adjacency = Adjacency.normalized(edges, n, dtype=torch.float64)
    matrix = adjacency.out_of.to_dense()
    x, v = torch.randn(n, 3), torch.randn(n, 3)

    def ours(x):
        return (adjacency.sum_in(x) ** 3).sum()

    def plain(x):
        return ((matrix.T @ x) ** 3).sum()

    assert torch.allclose(torch.func.grad(ours)(x), torch.func.grad(plain)(x))
    assert torch.allclose(torch.func.hessian(ours)(x), torch.func.hessian(plain)(x))
    assert torch.allclose(torch.func.jvp(ours, (x,), (v,))[1], torch.func.jvp(plain, (x,), (v,))[1])
    many = torch.randn(4, n, 3)
    assert torch.allclose(torch.func.vmap(torch.func.grad(ours))(many), torch.func.vmap(torch.func.grad(plain))(many))
    assert torch.autograd.gradgradcheck(ours, x.requires_grad_())


@pytest.mark.parametrize(
    ("edges", "nodes", "weight", "message"),
    [
        (torch.tensor([[0], [3]]), 3, None, "from 0 to 3"),
        (torch.tensor([[-1], [0]]), 3, None, "from -1 to 0"),
        (torch.zeros(3, 2, dtype=torch.int64), 3, None, r"\[2, edges\]"),
        (torch.zeros(2, 2), 3, None, "int64"),
        (torch.zeros(2, 0, dtype=torch.int64), 0, None, "at least one"),
        (chain(3), 3, torch.tensor([1.0]), "one number per edge"),
        (chain(3), 3, torch.tensor([1.0, -2.0]), "nonnegative"),
        (chain(3), 3, torch.tensor([1.0, torch.nan]), "finite"),
        (chain(3), 3, torch.ones(2, requires_grad=True), "constants"),
    ],
)
def test_a_wrong_graph_is_refused(edges, nodes, weight, message):
    with pytest.raises(ValueError, match=message):
        Adjacency.normalized(edges, nodes, weight)


# the projection


def test_the_projection_is_the_nearest_point():
    weight = torch.randn(5, 7) * torch.tensor([0.01, 0.1, 1, 10, 100])[:, None]
    projected = project_rows(weight, 0.9)
    assert torch.equal(projected[0], weight[0])
    assert (projected.abs().sum(dim=1) <= 0.9 + 1e-12).all()
    # the obtuse angle that characterizes a projection on a convex set, against many points of the ball
    others = torch.randn(2000, 7)
    others = 0.9 * others / others.abs().sum(dim=1, keepdim=True)
    for row, nearest in zip(weight, projected, strict=True):
        assert ((others - nearest) @ (row - nearest)).max() <= 1e-9


def test_the_projection_has_the_right_derivatives():
    weight = (torch.randn(4, 6) * torch.tensor([0.1, 1, 2, 5])[:, None]).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: project_rows(w, 0.9), weight)
    assert torch.autograd.gradgradcheck(lambda w: project_rows(w, 0.9).sin(), weight)


def test_zeros_inside_the_ball_have_a_gradient():
    weight = torch.zeros(3, 3, requires_grad=True)
    project_rows(weight, 0.9).sum().backward()
    assert torch.equal(weight.grad, torch.ones(3, 3))


def test_the_projection_of_a_vanishing_or_equal_row():
    assert torch.equal(project_rows(torch.zeros(1, 3), 0.5), torch.zeros(1, 3))
    assert torch.allclose(project_rows(torch.full((1, 4), -3.0), 0.8), torch.full((1, 4), -0.2))


# the layer


@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_solves_the_papers_equation(bias):
    edges, n = directed()
    layer = IGNNLayer(3, 4, bias=bias, solver=TIGHT)
    if bias:
        nn.init.normal_(layer.bias)
    u = torch.randn(n, 3)
    matrix = normalized(dense(edges, n))
    out = layer(u, Adjacency.normalized(edges, n, dtype=torch.float64))
    assert torch.allclose(out, by_hand(layer, u, matrix), atol=1e-12)


@pytest.mark.parametrize("estimator", EXACT)
def test_the_gradient_on_a_directed_chain_is_that_of_finite_differences(estimator):
    """The reference implementation takes A where the transposed is right in the weight's gradient, which on directed
    graphs is another direction."""
    u, target = torch.randn(8, 3), torch.randn(8, 4)
    adjacency = Adjacency.normalized(chain(8), 8, dtype=torch.float64)
    layer = IGNNLayer(3, 4, solver=TIGHT, gradient=EXACT[estimator])
    loss = (layer(u, adjacency) * target).sum()
    loss.backward()
    for parameter in layer.parameters():
        differences = torch.zeros_like(parameter)
        for i in range(parameter.numel()):
            ends = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    parameter.view(-1)[i] += step
                    ends.append((layer(u, adjacency) * target).sum())
                    parameter.view(-1)[i] -= step
            differences.view(-1)[i] = (ends[0] - ends[1]) / 2e-5
        assert torch.allclose(parameter.grad, differences, atol=1e-7)


@pytest.mark.parametrize("estimator", EXACT)
def test_gradients_equal_those_through_the_dense_iteration(estimator):
    edges, n = directed()
    u = torch.randn(n, 3, requires_grad=True)
    matrix = normalized(dense(edges, n))
    layer = IGNNLayer(3, 4, solver=TIGHT, gradient=EXACT[estimator])
    with torch.no_grad():
        raw(layer).mul_(3)  # most rows outside the ball
    inputs = (u, *layer.parameters())
    found = torch.autograd.grad(layer(u, Adjacency.normalized(edges, n, dtype=torch.float64)).sin().sum(), inputs)
    expected = torch.autograd.grad(by_hand(layer, u, matrix).sin().sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_second_derivatives_of_the_exact_gradient():
    edges, n = directed()
    u = torch.randn(n, 2, requires_grad=True)
    matrix = normalized(dense(edges, n))
    layer = IGNNLayer(2, 3, activation="elu", solver=TIGHT, gradient=EXACT["implicit"])
    adjacency = Adjacency.normalized(edges, n, dtype=torch.float64)

    def elu_by_hand(u):
        injection = matrix.T @ layer.injection(u) + layer.bias
        z = torch.zeros_like(injection)
        for _ in range(300):
            z = nn.functional.elu(matrix.T @ z @ layer.equilibrium.cell.weight.T + injection)
        return z

    def second(run):
        (g,) = torch.autograd.grad(run(u).sin().sum(), u, create_graph=True)
        return torch.autograd.grad(g.square().sum(), (u, raw(layer), layer.injection.weight))

    for a, b in zip(second(lambda u: layer(u, adjacency)), second(elu_by_hand), strict=True):
        assert torch.allclose(a, b, atol=1e-11)


def test_a_second_derivative_of_a_first_order_estimator_raises():
    layer = IGNNLayer(2, 3, gradient=ti.NeumannPhantom())
    u = torch.randn(4, 2, requires_grad=True)
    loss = layer(u, Adjacency.normalized(chain(4), 4, dtype=torch.float64)).sum()
    (g,) = torch.autograd.grad(loss, u, create_graph=True)
    with pytest.raises(ti.UnsupportedDerivativeError):
        g.sum().backward()


def test_forward_mode_and_functional_transforms():
    edges, n = directed()
    layer = IGNNLayer(2, 3, solver=TIGHT, gradient=EXACT["implicit"])
    adjacency = Adjacency.normalized(edges, n, dtype=torch.float64)
    u, v = torch.randn(n, 2), torch.randn(n, 2)

    def run(u):
        return layer(u, adjacency).sin().sum()

    (g,) = torch.autograd.grad(run(u.requires_grad_()), u)
    assert torch.allclose(torch.func.grad(run)(u.detach()), g)
    assert torch.allclose(torch.func.jvp(run, (u.detach(),), (v,))[1], (g * v).sum())
    both = torch.func.vmap(torch.func.grad(run))(torch.stack([u.detach(), v]))
    assert torch.allclose(both[0], g)


def test_neither_training_nor_evaluation_changes_the_weight():
    layer = IGNNLayer(2, 4)
    with torch.no_grad():
        raw(layer).normal_()
    before = copy.deepcopy(layer.state_dict())
    adjacency = Adjacency.normalized(chain(5), 5, dtype=torch.float64)
    u = torch.randn(5, 2)
    trained = layer.train()(u, adjacency)
    assert torch.equal(trained, layer.eval()(u, adjacency))
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert layer.equilibrium.cell.weight.abs().sum(dim=1).max() <= 0.9 + 1e-12


def test_the_weight_is_projected_once_per_solve(monkeypatch):
    layer = IGNNLayer(2, 4)
    calls = []
    forward = InfinityNormBall.forward
    monkeypatch.setattr(InfinityNormBall, "forward", lambda self, w: calls.append(None) or forward(self, w))
    layer(torch.randn(5, 2), Adjacency.normalized(chain(5), 5, dtype=torch.float64)).sum().backward()
    assert layer.equilibrium.solution.evaluations > 3
    assert len(calls) == 1


def test_it_is_well_posed_on_a_graph_with_a_larger_eigenvalue():
    edges = torch.randint(10, (2, 60))
    adjacency = Adjacency.weighted(edges, 10, dtype=torch.float64)
    assert adjacency.perron > 3
    u = torch.randn(10, 2)
    with pytest.raises(ValueError, match="perron="):
        IGNNLayer(2, 4)(u, adjacency)
    layer = IGNNLayer(2, 4, perron=adjacency.perron, start=UniformStart())
    layer(u, adjacency)
    assert bool(layer.equilibrium.solution.converged)


def test_isolated_nodes_and_graphs_without_edges():
    empty = torch.zeros(2, 0, dtype=torch.int64)
    layer = IGNNLayer(2, 4, solver=TIGHT)
    u = torch.randn(3, 2, requires_grad=True)
    out = layer(u, Adjacency.normalized(empty, 3, dtype=torch.float64))
    assert torch.allclose(out, by_hand(layer, u, torch.eye(3)))
    out.sum().backward()
    assert u.grad.isfinite().all()
    # without a self-loop such a node gets nothing but the bias
    out = layer(u, Adjacency.weighted(empty, 3, dtype=torch.float64))
    assert torch.equal(out, torch.zeros(3, 4))


@pytest.mark.parametrize("activation", ["relu", "elu"])
def test_a_batch_solved_graph_by_graph_is_the_batch_solved_whole(activation):
    sizes = (3, 1, 5)
    edges = torch.cat([chain(3), chain(5) + 4], dim=1)
    batch = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    adjacency = Adjacency.normalized(edges, 9, dtype=torch.float64)
    whole = IGNNLayer(2, 4, activation=activation, solver=TIGHT, gradient=EXACT["implicit"])
    apart = IGNNLayer(2, 4, activation=activation, solver=TIGHT, gradient=EXACT["implicit"], per_graph=True)
    nn.init.normal_(whole.bias)
    apart.load_state_dict(whole.state_dict())
    u = torch.randn(9, 2)
    assert torch.allclose(whole(u, adjacency), apart(u, adjacency, batch), atol=1e-12)
    assert apart.equilibrium.solution.steps.shape == (3,)
    for layer in (whole, apart):
        layer(u, adjacency, batch).sin().sum().backward()
    for a, b in zip(whole.parameters(), apart.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-11)
    with pytest.raises(ValueError, match="increasing order"):
        apart(u, adjacency, batch.flip(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"kappa": 1.0}, "kappa"), ({"perron": 0.0}, "perron"), ({"activation": "tanh"}, "activation")],
)
def test_wrong_settings_of_a_layer_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        IGNNLayer(2, 3, **arguments)


# the models


def batch_of_graphs():
    edges = torch.cat([chain(4), chain(4).flip(0), chain(3) + 4], dim=1)
    return torch.randn(8, 5), edges, torch.tensor([0, 0, 0, 0, 1, 1, 1, 2])


def test_graph_classification_treats_graphs_apart():
    x, edges, batch = batch_of_graphs()
    model = IGNN(ignn_tu(5, 3), solver=TIGHT).eval()
    out = model(x, edges, batch=batch)
    assert out.shape == (3, 3)
    alone = model(x[:4], edges[:, :6])
    assert torch.allclose(out[:1], alone)
    assert model(x, edges, batch=batch, graphs=5).shape == (5, 3)


def test_node_classification():
    x, edges, _ = batch_of_graphs()
    config = IGNNConfig(features=5, classes=7, widths=(6, 7), skips=True, head="none", kappa=0.98)
    model = IGNN(config)
    assert model(x, edges).shape == (8, 7)
    assert len(model.equilibria()) == 2
    adjacency = Adjacency.normalized(edges, 8, dtype=torch.float64)
    assert torch.equal(model(x, edges), model(x, adjacency))


def test_the_named_configurations_are_those_of_the_paper():
    assert ignn_tu(3).widths == (64, 64, 64)
    assert ignn_tu(3).kappa == 0.9
    ppi = ignn_ppi()
    assert (ppi.widths, ppi.kappa, ppi.skips) == ((1024, 512, 512, 256, 121), 0.98, True)
    assert ignn_chains().widths == (16,)
    assert ignn_chains().start == IdentityStart(scale=0.8)


def test_long_chains_carry_the_class_from_the_start():
    """The class stands on the first node; near the identity, the last one still tells it from noise."""
    length = 60
    x = torch.zeros(2 * length, 4)
    x[0, 0] = x[length, 1] = 1.0
    edges = torch.cat([chain(length), chain(length) + length], dim=1)
    model = IGNN(ignn_chains(4), solver=TIGHT).eval()
    scores = model(x, edges)
    ends = scores[[length - 1, 2 * length - 1]]
    assert torch.allclose(ends, scores[[0, length]], atol=1e-8)
    assert not torch.allclose(ends[0], ends[1], atol=1e-2)


def test_single_precision_and_autocast():
    torch.set_default_dtype(torch.float32)
    x, edges, batch = batch_of_graphs()
    model = IGNN(ignn_tu(5)).eval()
    out = model(x, edges, batch=batch)
    assert out.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(x, edges, batch=batch)
    assert torch.allclose(out, half.float(), atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": ()}, "widths"),
        ({"kappa": 1.5}, "kappa"),
        ({"dropout": 1.0}, "dropout"),
        ({"pool": "mean"}, "pool"),
        ({"head": "none"}, "number of classes"),
    ],
)
def test_wrong_settings_of_a_model_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        IGNNConfig(features=2, classes=3, **arguments)


def test_input_that_does_not_fit_is_refused():
    model = IGNN(ignn_tu(5))
    x, edges, _ = batch_of_graphs()
    with pytest.raises(ValueError, match=r"\[nodes, 5\]"):
        model(x[:, :4], edges)
    with pytest.raises(ValueError, match="weights already"):
        model(x, Adjacency.normalized(edges, 8, dtype=torch.float64), torch.ones(8))
    with pytest.raises(ValueError, match="graph has 9 nodes"):
        model(x, Adjacency.normalized(edges, 9, dtype=torch.float64))


def test_a_node_that_nothing_reaches_does_not_spoil_the_gradient():
    """Its features are zero, and bringing zero to length one must not divide by it."""
    x = torch.zeros(3, 4)
    x[0, 0] = 1.0
    model = IGNN(ignn_chains(4), solver=TIGHT).eval()
    out = model(x, torch.tensor([[0], [1]]))
    out.sum().backward()
    assert torch.equal(out[2], torch.zeros(2))
    assert all(p.grad.abs().max() < 1e3 for p in model.parameters())
