"""The DEQ transformer token by token: tokens that leave a solve, and generation with a cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_transformer
import torch

import torchimplicit as ti
from torchimplicit.models import DEQTransformer, ExplicitTransformer
from torchimplicit.models.deq_transformer import generate, solve_by_token

TINY = replace(tiny_transformer.TINY, gain=0.15, injection_gain=2.0)


@pytest.fixture(autouse=True)
def _one_seed(one_thread):
    torch.manual_seed(0)


def made(rtol: float = 1e-12, **changes) -> DEQTransformer:
    solver = ti.Anderson(rtol=rtol, max_steps=200)
    return DEQTransformer(replace(TINY, **changes), solver=solver).double().eval()


def words(length: int = 10, batch: int = 3) -> torch.Tensor:
    return torch.randint(0, TINY.vocabulary, (batch, length))


class TestTokensLeave:
    @pytest.mark.parametrize("normalization", ["post", "pre"])
    @pytest.mark.parametrize(("solver", "steps"), [(None, 0), (ti.Anderson(memory=3), 3)])
    def test_with_the_same_solution(self, normalization, solver, steps):
        model = made(normalization=normalization)
        _, memory = model(words(6), words(6))
        x, _ = model.cell.injection(model.embedding(words()), memory)
        found = solve_by_token(model.equilibrium, x, rtol=1e-13, solver=solver, steps=steps, max_evaluations=400)
        assert found.solution.converged.all()
        torch.testing.assert_close(found.solution.value, model.equilibrium(x), rtol=1e-9, atol=1e-10)
        assert (found.left.diff() >= 0).all()
        assert steps or found.left[0] < found.left[-1]
        assert found.solution.evaluations <= 3

    def test_with_normalized_weights(self):
        model = made(weight_norm=True)
        x, _ = model.cell.injection(model.embedding(words()))
        found = solve_by_token(model.equilibrium, x, rtol=1e-13, max_evaluations=400)
        torch.testing.assert_close(found.solution.value, model.equilibrium(x), rtol=1e-9, atol=1e-10)
        found.solution.value.sum().backward()
        assert all(p.grad is not None for p in model.cell.widen.parameters())

    def test_at_a_loose_tolerance_the_whole_problem_goes_on(self):
        model = made(rtol=1e-10)
        x, _ = model.cell.injection(model.embedding(words()))
        found = solve_by_token(model.equilibrium, x, rtol=0.1)
        assert found.solution.converged.all()
        assert found.solution.evaluations > 3
        torch.testing.assert_close(model.cell(found.solution.value, x), found.solution.value, rtol=1e-8, atol=1e-8)

    def test_gradients_are_the_layers(self):
        model = made()
        gradients = []
        for by_token in (True, False):
            x, _ = model.cell.injection(model.embedding(words().fill_(3)))
            layer = model.equilibrium
            z = solve_by_token(layer, x, rtol=1e-12).solution.value if by_token else layer(x)
            gradients.append(torch.autograd.grad(z.square().sum() + z.sum().sin(), model.cell.widen.weight)[0])
        torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-9)

    def test_dropout_is_refused(self):
        model = made(dropout=0.1).train()
        x, _ = model.cell.injection(model.embedding(words()))
        with pytest.raises(ValueError, match="dropout mask"):
            solve_by_token(model.equilibrium, x)


class TestGenerate:
    @pytest.mark.parametrize("normalization", ["post", "pre"])
    @pytest.mark.parametrize("window", [None, 4])
    def test_the_cache_changes_nothing(self, normalization, window):
        model = made(normalization=normalization, window=window)
        cached, whole = (generate(model, words().fill_(5), 8, temperature=0, cache=cache) for cache in (True, False))
        assert torch.equal(cached.tokens, whole.tokens)
        torch.testing.assert_close(cached.log_probabilities, whole.log_probabilities, rtol=1e-9, atol=1e-9)
        assert cached.evaluations < 0.3 * whole.evaluations

    def test_probabilities_are_the_loss(self):
        model = made()
        found = generate(model, words(4), 5, generator=torch.Generator().manual_seed(1))
        loss, _ = model(found.tokens[:, :-1], found.tokens[:, 1:])
        torch.testing.assert_close(found.log_probabilities, -loss[:, 3:], rtol=1e-9, atol=1e-9)

    def test_of_layers_with_weights_of_their_own(self):
        model = ExplicitTransformer(TINY, 3).double().eval()
        prompt = words()
        cached, whole = (generate(model, prompt, 6, temperature=0, cache=cache) for cache in (True, False))
        assert torch.equal(cached.tokens, whole.tokens)
        torch.testing.assert_close(cached.log_probabilities, whole.log_probabilities, rtol=1e-9, atol=1e-9)
        assert whole.evaluations == 3 * (10 + 15) / 2

    def test_a_looped_layer_has_no_fixed_point_to_keep(self):
        solver = ti.FixedPointIteration(steps=2)
        model = DEQTransformer(TINY, solver=solver, gradient=ti.Unrolled()).double().eval()
        with pytest.raises(ValueError, match="cache=False"):
            generate(model, words(), 1)
        found = generate(model, words(4), 5, cache=False, generator=torch.Generator().manual_seed(1))
        loss, _ = model(found.tokens[:, :-1], found.tokens[:, 1:])
        torch.testing.assert_close(found.log_probabilities, -loss[:, 3:], rtol=1e-9, atol=1e-9)

    def test_tokens_that_may_not_be_drawn(self):
        model = made()
        prompt = words(4, batch=1).expand(300, -1)
        three = generate(model, prompt, 1, top=3, generator=torch.Generator().manual_seed(0)).tokens[:, -1].unique()
        assert len(three) == 3
        rest = generate(model, prompt, 1, top=3, exclude=three.tolist(), generator=torch.Generator().manual_seed(0))
        assert not torch.isin(rest.tokens[:, -1], three).any()

    def test_draws_follow_the_temperature(self):
        model = made()
        prompt = words(4, batch=1).expand(400, -1)
        sharp, flat = (
            generate(model, prompt, 1, temperature=t, generator=torch.Generator().manual_seed(0)).tokens[:, -1]
            for t in (0.01, 100.0)
        )
        assert len(sharp.unique()) < len(flat.unique())

    def test_beyond_the_context(self):
        assert generate(made(), words(20), 10).tokens.shape == (3, 30)

    @pytest.mark.parametrize("cutoffs", [(), (8,), (8, 15)])
    def test_all_log_probabilities(self, cutoffs):
        model = made(cutoffs=cutoffs)
        hidden = torch.randn(1, 12, dtype=torch.float64)
        every = torch.arange(TINY.vocabulary)
        expected = -model.softmax(hidden.expand(len(every), -1), every)
        torch.testing.assert_close(model.softmax.log_probabilities(hidden)[0], expected)

    @pytest.mark.parametrize(
        ("change", "message"),
        [({"count": 0}, "count is 0"), ({"temperature": -1.0}, "temperature"), ({"prompt": words(0)}, "prompt")],
    )
    def test_bad_input(self, change, message):
        with pytest.raises(ValueError, match=message):
            generate(**{"model": made(), "prompt": words(), "count": 1} | change)
        with pytest.raises(ValueError, match="training mode"):
            generate(made().train(), words(), 1)
