"""Text from a language model, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from torchimplicit.models.deq_transformer.explicit import ExplicitTransformer
from torchimplicit.models.deq_transformer.language_model import LanguageModel, joined
from torchimplicit.models.deq_transformer.model import DEQTransformer
from torchimplicit.solvers import FixedPointIteration
from torchimplicit.validation import at_least


@final
@dataclass(frozen=True, kw_only=True)
class Generated:
    """Generated text.

    Attributes:
        tokens: int64 ``[batch, prompt + count]``, the prompt included.
        log_probabilities: of every generated token under the model, ``[batch, count]``.
        evaluations: mean over the generated tokens of the evaluations of a layer, times the tokens in each.
    """

    tokens: Tensor
    log_probabilities: Tensor
    evaluations: float


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Tensor,
    count: int,
    *,
    temperature: float = 1.0,
    top: int | None = None,
    exclude: Sequence[int] = (),
    generator: torch.Generator | None = None,
    cache: bool = True,
) -> Generated:
    """Continue a text.

    The states of the tokens before a new one do not depend on it: an equilibrium solves them once, and the new token's
    state alone against the keys and values of their fixed points; layers with weights of their own keep what each of
    them got. Beyond ``config.context`` positions the oldest are forgotten; with the cache, later states still know of
    them through those that saw them, as with a memory.

    Args:
        model: in eval mode.
        prompt: int64 ``[batch, length]``, at least one token.
        count: tokens to add.
        temperature: divides the log-probabilities before a token is drawn; 0: the most probable token is taken.
        top: draw among this many most probable tokens only; ``None``: among all.
        exclude: tokens that are never generated, such as that of unknown words.
        generator: for the draws.
        cache: ``False`` computes the whole text for every token. A layer applied a given number of times needs that:
            a token's state depends on the earlier tokens' states at every application, not on the last alone.

    Raises:
        ValueError: a model in training mode, an empty prompt, a number out of range, or ``cache`` with a layer applied
            a given number of times.
    """
    at_least("generate", "count", count, 1)
    if top is not None:
        at_least("generate", "top", top, 1)
    if model.training:
        raise ValueError("generate: the model is in training mode, with dropout; call model.eval()")
    if prompt.ndim != 2 or not prompt.shape[1]:
        raise ValueError(f"prompt has shape {tuple(prompt.shape)}, and must be [batch, length] with length >= 1")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}, and must not be negative")
    if cache and _looped(model):
        raise ValueError(
            "generate: the layer is applied a given number of times, which leaves no fixed point to keep; pass "
            "cache=False"
        )
    context = model.config.context
    tokens, new, past = prompt, prompt[:, -context:], None
    found, evaluations = [], 0.0
    for _ in range(count):
        hidden, kept, applied = _read(model, new, past)
        evaluations += applied
        scores = model.softmax.log_probabilities(hidden)
        drawn = _drawn(scores, temperature, top, exclude, generator)
        found.append(scores.gather(1, drawn))
        tokens = torch.cat((tokens, drawn), dim=1)
        new, past = (drawn, kept) if cache else (tokens[:, -context:], None)
    return Generated(tokens=tokens, log_probabilities=torch.cat(found, dim=1), evaluations=evaluations / count)


def _looped(model: LanguageModel) -> bool:
    solver = model.equilibrium.solver if isinstance(model, DEQTransformer) else None
    return isinstance(solver, FixedPointIteration) and solver.steps is not None


def _read(model: LanguageModel, tokens: Tensor, past: Any) -> tuple[Tensor, Any, float]:
    """The last token's hidden state ``[batch, d_model]``, what later tokens attend to, and the evaluations."""
    keep = model.config.context - 1
    embedded = model.embedding(tokens)
    if isinstance(model, DEQTransformer):
        x, _ = model.cell.injection(embedded, past)
        solution = model.equilibrium.solve(x)
        z, applied = solution.value, solution.evaluations
        past = model.cell.after(x, z).memory[:, :, -keep:]
    else:
        assert isinstance(model, ExplicitTransformer)
        z, seen = model.hidden(embedded, past)
        past, applied = joined(past, seen, keep), len(model.layers)
    return z[:, -1], past, applied * tokens.shape[1]


def _drawn(
    scores: Tensor, temperature: float, top: int | None, exclude: Sequence[int], generator: torch.Generator | None
) -> Tensor:
    """One token of each row, int64 ``[batch, 1]``."""
    if exclude:
        scores = scores.index_fill(1, torch.tensor(exclude, device=scores.device), -torch.inf)
    if temperature == 0:
        return scores.argmax(dim=1, keepdim=True)
    if top is not None and top < scores.shape[1]:
        least = scores.topk(top, dim=1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    return torch.multinomial((scores / temperature).softmax(dim=1), 1, generator=generator)
