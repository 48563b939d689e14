"""The DEQ transformer: its map, its derivatives, its memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_transformer
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import torchimplicit as ti
from torchimplicit.models import (
    DEQTransformer,
    deq_transformer_small,
    deq_transformer_wikitext103,
)
from torchimplicit.models.deq_transformer import AdaptiveEmbedding, AdaptiveSoftmax

# As narrow as this the map contracts less than at its real width, so that it starts with a larger share of the input.
TINY = replace(tiny_transformer.TINY, gain=0.3, injection_gain=2.0)
PRECISE = ti.Anderson(rtol=1e-13, max_steps=300)
EXACT = ti.Implicit(linear_solver=ti.GMRES(rtol=1e-13))
NORMALIZATIONS = ("post", "pre")


@pytest.fixture(autouse=True)
def _one_seed(one_thread):
    torch.manual_seed(0)


def make(solver=PRECISE, gradient=EXACT, **changes) -> DEQTransformer:
    config = replace(TINY, **changes)
    torch.manual_seed(1)
    model = DEQTransformer(config, solver=solver, gradient=gradient).double()
    with torch.no_grad():  # biases away from zero, or half of the formulas would go untested
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def text(length: int = 8, batch: int = 3):
    words = torch.randint(0, TINY.vocabulary, (batch, length + 1))
    return words[:, :-1], words[:, 1:]


def scores_written_out(cell, z, x_embedded, memory):
    """The attention of one sequence, by its formula: loops over heads, queries and keys."""
    attention, size = cell.attention, cell.config.d_head
    length = len(z)
    projected = (z @ attention.project.weight.T + cell.inject(x_embedded)).view(length, -1, 3, size)
    q, k, v = projected.unbind(2)
    if memory is not None:
        weight = attention.project.weight.view(-1, 3, size, z.shape[1])[:, 1:]
        old = torch.einsum("hcsd,ld->lhcs", weight, memory.states[0])
        old = old + memory.injected[0].view(len(old), -1, 2, size)
        k, v = torch.cat((old[:, :, 0], k)), torch.cat((old[:, :, 1], v))
    past = len(k) - length
    half = z.shape[1] // 2
    frequency = 10000.0 ** -(torch.arange(half, dtype=z.dtype) / half)
    out = torch.zeros_like(q)
    for h in range(cell.config.heads):
        rows = attention.position.weight.view(-1, size, z.shape[1])[h]
        for i in range(length):
            keys = range(past + i + 1)
            scores = []
            for j in keys:
                angle = (past + i - j) * frequency
                r = rows @ torch.cat((angle.sin(), angle.cos()))
                content = (q[i, h] + attention.content_bias[h]) @ k[j, h]
                scores.append((content + (q[i, h] + attention.position_bias[h]) @ r) / size**0.5)
            weights = torch.stack(scores).softmax(0)
            out[i, h] = weights @ v[: past + i + 1, h]
    return out.flatten(1)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_kernels_of_an_evaluation(normalization):
    """What the state does not move is computed outside: of projections there are four, and of the rest little."""
    model = make(normalization=normalization)
    _, memory = model(*text())
    x, _ = model.cell.injection(model.embedding(text()[0]), memory)
    z = torch.zeros(3, 8, 12, dtype=torch.float64)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if not any(returned.alias_info for returned in func._schema.returns):
                seen.append(str(func))
            return out

    with torch.no_grad(), Watch():
        model.cell.attention(z, *x)
        assert len([name for name in seen if "view" not in name]) == 9, seen
        seen.clear()
        model.cell(z, x)
    assert len([name for name in seen if "view" not in name]) == 17, seen
    assert len([name for name in seen if "addmm" in name and "badd" not in name]) == 4, seen


@pytest.mark.parametrize("remembered", [False, True])
def test_attention_is_its_formula(remembered):
    model = make()
    cell = model.cell
    memory = model(*text(batch=1))[1] if remembered else None
    embedded, z = torch.randn(1, 6, 12, dtype=torch.float64), torch.randn(1, 6, 12, dtype=torch.float64)
    x, _ = cell.injection(embedded, memory)
    expected = scores_written_out(cell, z[0], embedded[0], memory)
    torch.testing.assert_close(cell.attention(z, *x), expected)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_map_sees_no_later_token(normalization):
    model = make(normalization=normalization)
    tokens, _ = text()
    other = tokens.clone()
    other[:, 5] = (other[:, 5] + 1) % TINY.vocabulary
    z = torch.randn(3, 8, 12, dtype=torch.float64)
    maps = [model.cell(z, model.cell.injection(model.embedding(t))[0]) for t in (tokens, other)]
    assert torch.equal(maps[0][:, :5], maps[1][:, :5])
    assert bool((maps[0][:, 5:] != maps[1][:, 5:]).any())
    moved = z.clone()
    moved[:, 5:] += 1
    x, _ = model.cell.injection(model.embedding(tokens))
    assert torch.equal(model.cell(z, x)[:, :5], model.cell(moved, x)[:, :5])


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_losses_depend_on_no_later_token(normalization):
    model = make(normalization=normalization)
    tokens, targets = text()
    other = tokens.clone()
    other[:, 5] = (other[:, 5] + 1) % TINY.vocabulary
    losses = [model(t, targets)[0] for t in (tokens, other)]
    torch.testing.assert_close(losses[0][:, :5], losses[1][:, :5], rtol=1e-9, atol=1e-9)
    assert float((losses[0][:, 5:] - losses[1][:, 5:]).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_two_segments_with_memory_are_one(normalization, window):
    """The equilibrium of the past does not depend on what follows, so that its memory is exact: where the memory holds
    all that may be attended to, the losses are those of the long segment, to the solver's tolerance."""
    model = make(normalization=normalization, window=window, memory=8 if window is None else 3)
    tokens, targets = text(length=16)
    whole, _ = model(tokens, targets)
    first, memory = model(tokens[:, :8], targets[:, :8])
    second, memory = model(tokens[:, 8:], targets[:, 8:], memory)
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole, rtol=1e-9, atol=1e-9)
    assert memory.states.shape == (3, 8 if window is None else 3, 12)
    assert not any(part.requires_grad for part in memory)


def test_a_short_memory_loses_the_distant_past():
    model = make(memory=2)
    tokens, targets = text(length=16)
    whole, _ = model(tokens, targets)
    _, memory = model(tokens[:, :8], targets[:, :8])
    second, _ = model(tokens[:, 8:], targets[:, 8:], memory)
    assert float((second - whole[:, 8:]).detach().abs().max()) > 1e-4


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_exact_gradients_are_those_of_unrolling(normalization):
    tokens, targets = text()
    found = []
    for solver, gradient in ((PRECISE, EXACT), (ti.FixedPointIteration(rtol=1e-14, max_steps=2000), ti.Unrolled())):
        model = make(solver, gradient, normalization=normalization)
        _, memory = model(*text(batch=3, length=4)) if not found else (None, found[0][1])
        loss, _ = model(tokens, targets, memory)
        parameters = list(model.parameters())
        found.append((torch.autograd.grad(loss.square().sum(), parameters), memory))
    for (name, _), exact, unrolled in zip(model.named_parameters(), found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(exact, unrolled, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
        assert bool(exact.any()), name


def test_second_derivatives_are_those_of_unrolling():
    tokens, targets = text(length=4, batch=2)
    found = []
    for solver, gradient in ((PRECISE, EXACT), (ti.FixedPointIteration(rtol=1e-14, max_steps=500), ti.Unrolled())):
        model = make(solver, gradient, cutoffs=(), div_val=1)
        weights = [model.cell.attention.project.weight, model.cell.widen.weight, model.embedding.tables[0]]
        loss, _ = model(tokens, targets)
        first = torch.autograd.grad(loss.sum(), weights, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), weights))
    for exact, unrolled in zip(*found, strict=True):
        torch.testing.assert_close(exact, unrolled, rtol=1e-6, atol=1e-8)


def test_sequences_do_not_see_each_other():
    model = make(solver=ti.Anderson(rtol=1e-6))
    tokens, targets = text(batch=5)
    _, memory = model(*text(batch=5))
    together, _ = model(tokens, targets, memory)
    for row in range(5):
        alone, _ = model(tokens[row, None], targets[row, None], type(memory)(*(part[row, None] for part in memory)))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_dropout_has_one_mask_a_solve(normalization):
    model = make(normalization=normalization, dropout=0.3, attention_dropout=0.2)
    tokens, targets = text()
    a, b = (model(tokens, targets)[0] for _ in range(2))
    assert bool(model.equilibrium.solution.converged.all())  # with a new mask an evaluation it would not
    assert not torch.equal(a, b)
    a.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    model.eval()
    torch.testing.assert_close(*(model(tokens, targets)[0] for _ in range(2)))


def test_weight_normalization_keeps_the_map_at_the_start():
    tokens, targets = text()
    plain, normalized = (make(weight_norm=value) for value in (False, True))
    state = normalized.state_dict()
    assert any("parametrizations" in name for name in state)
    loss, _ = normalized(tokens, targets)
    loss.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in normalized.parameters())
    assert sum(p.numel() for p in plain.parameters()) < sum(p.numel() for p in normalized.parameters())


def test_it_is_restored_from_its_state_dict():
    model, other = make(weight_norm=True), make(weight_norm=True)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    other.load_state_dict(model.state_dict())
    tokens, targets = text()
    assert torch.equal(model(tokens, targets)[0], other(tokens, targets)[0])


def test_it_runs_under_autocast():
    model = make(solver=ti.Anderson(), gradient=ti.UnrolledPhantom(), dropout=0.1).float()
    tokens, targets = text()
    with torch.autocast("cpu", torch.bfloat16):
        loss, memory = model(tokens, targets)
        loss, memory = model(tokens, targets, memory)
    assert loss.dtype == torch.float32
    assert memory.states.dtype == torch.float32  # the state stays in full precision
    loss.mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_the_regularizer_takes_the_solution():
    model = make(solver=ti.Anderson(rtol=1e-6), dropout=0.1)
    x, _ = model.cell.injection(model.embedding(text()[0]))
    solution = model.equilibrium.solve(x)
    ti.regularizers.jacobian_frobenius(solution.problem, solution.value.detach(), *solution.args).backward()
    assert bool(model.cell.attention.project.weight.grad.any())


def test_adaptive_softmax_is_a_distribution():
    softmax = make().softmax
    hidden = torch.randn(4, 12, dtype=torch.float64)
    every = torch.arange(TINY.vocabulary)
    for h in hidden:
        loss = softmax(h.expand(TINY.vocabulary, -1), every)
        torch.testing.assert_close(loss.neg().exp().sum(), torch.ones((), dtype=torch.float64))


def test_adaptive_softmax_without_clusters_is_cross_entropy():
    model = make(cutoffs=(), div_val=1)
    hidden, targets = torch.randn(6, 12, dtype=torch.float64), torch.randint(0, TINY.vocabulary, (6,))
    scores = hidden @ model.embedding.tables[0].T + model.softmax.biases[0]
    expected = torch.nn.functional.cross_entropy(scores, targets, reduction="none")
    torch.testing.assert_close(model.softmax(hidden, targets), expected)


def test_tied_weights_are_one_parameter():
    tied, untied = make(), make(tied=False)
    assert all(a is b for a, b in zip(tied.embedding.tables, tied.softmax.tables, strict=True))
    assert tied.embedding.projections["2"] is tied.softmax.projections["2"]
    assert tied.embedding.projections["0"] is not tied.softmax.projections["0"]
    assert not any(a is b for a, b in zip(untied.embedding.tables, untied.softmax.tables, strict=True))


def test_embeddings_start_at_unit_size():
    config = replace(TINY, vocabulary=600, cutoffs=(200, 400), d_model=64)
    for tied in (True, False):
        embedded = AdaptiveEmbedding(replace(config, tied=tied))(torch.arange(600))
        for cluster in embedded.detach().split(200):
            assert float(cluster.square().mean()) == pytest.approx(1, rel=0.2)
    assert isinstance(AdaptiveSoftmax(config, AdaptiveEmbedding(config)), torch.nn.Module)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_it_is_solvable_from_the_start(normalization):
    torch.manual_seed(0)
    config = deq_transformer_small(vocabulary=300, normalization=normalization)
    model = DEQTransformer(config, solver=ti.Anderson(rtol=1e-3))
    words = torch.randint(0, 300, (4, 33))
    _, memory = model(words[:, :-1], words[:, 1:])
    model(words[:, :-1], words[:, 1:], memory)
    solution = model.equilibrium.solution
    assert bool(solution.converged.all())
    assert solution.evaluations < 40


def test_parameter_count_of_the_paper():
    with torch.device("meta"):
        model = DEQTransformer(deq_transformer_wikitext103())
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert 97.5 < millions < 98.5  # Geng et al. (2021), table 3: 98M
    assert sum(p.numel() for p in (*model.cell.widen.parameters(), *model.cell.narrow.parameters())) > 67e6


def test_a_segment_longer_than_the_context_raises():
    model = make()
    with pytest.raises(ValueError, match="25 tokens with a memory of 0 positions is longer than the context of 24"):
        model(*text(length=25))
    _, memory = model(*text(length=8))
    with pytest.raises(ValueError, match="20 tokens with a memory of 5"):
        model(*text(length=20), memory)


def test_bad_input_raises():
    model = make()
    tokens, targets = text()
    with pytest.raises(ValueError, match="vocabulary has 23"):
        model(tokens + 20, targets)
    with pytest.raises(ValueError, match="targets have shape"):
        model(tokens, targets[:, 1:])
    with pytest.raises(ValueError, match=r"\[batch, length\]"):
        model(tokens[0], targets[0])
    _, memory = model(tokens, targets)
    with pytest.raises(ValueError, match="memory holds 3 sequences"):
        model(tokens[:2], targets[:2], memory)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cutoffs": (8, 8)}, "rise strictly"),
        ({"cutoffs": (8, 23)}, "rise strictly"),
        ({"div_val": 4}, "no width"),
        ({"normalization": "middle"}, "must be"),
        ({"dropout": 1.0}, "dropout"),
        ({"memory": 24}, "no room"),
        ({"heads": 0}, "heads"),
    ],
)
def test_bad_configs_raise(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(TINY, **changes)
