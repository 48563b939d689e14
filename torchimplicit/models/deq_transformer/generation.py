"""Text from a DEQ transformer, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from torchimplicit.models.deq_transformer.model import DEQTransformer
from torchimplicit.validation import at_least


@final
@dataclass(frozen=True, kw_only=True)
class Generated:
    """Generated text.

    Attributes:
        tokens: int64 ``[batch, prompt + count]``, the prompt included.
        log_probabilities: of every generated token, ``[batch, count]``.
        evaluations: mean over the generated tokens of the evaluations of the layer, times the tokens in each.
    """

    tokens: Tensor
    log_probabilities: Tensor
    evaluations: float


@torch.no_grad()
def generate(
    model: DEQTransformer,
    prompt: Tensor,
    count: int,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    cache: bool = True,
) -> Generated:
    """Continue a text.

    The states of the tokens before a new one do not depend on it: they are solved once, and the new token's state is
    solved alone against the keys and values of their fixed points. Beyond ``config.context`` positions the oldest are
    forgotten; with the cache, later states still know of them through those that saw them, as with a memory.

    Args:
        model: in eval mode.
        prompt: int64 ``[batch, length]``, at least one token.
        count: tokens to add.
        temperature: divides the log-probabilities before a token is drawn; 0: the most probable token is taken.
        generator: for the draws.
        cache: ``False`` solves the whole text for every token: for comparison.

    Raises:
        ValueError: a model in training mode, an empty prompt, or a number out of range.
    """
    at_least("generate", "count", count, 1)
    if model.training:
        raise ValueError("generate: the model is in training mode, with dropout; call model.eval()")
    if prompt.ndim != 2 or not prompt.shape[1]:
        raise ValueError(f"prompt has shape {tuple(prompt.shape)}, and must be [batch, length] with length >= 1")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}, and must not be negative")
    cell, context = model.cell, model.config.context
    tokens, new, past = prompt, prompt[:, -context:], None
    found, evaluations = [], 0.0
    for _ in range(count):
        x, _ = cell.injection(model.embedding(new), past)
        solution = model.equilibrium.solve(x)
        evaluations += solution.evaluations * new.shape[1]
        scores = model.softmax.log_probabilities(solution.value[:, -1])
        if temperature == 0:
            drawn = scores.argmax(dim=1, keepdim=True)
        else:
            drawn = torch.multinomial((scores / temperature).softmax(dim=1), 1, generator=generator)
        found.append(scores.gather(1, drawn))
        tokens = torch.cat((tokens, drawn), dim=1)
        if cache:
            new, past = drawn, cell.after(x, solution.value).memory[:, :, -(context - 1) :]
        else:
            new = tokens[:, -context:]
    return Generated(tokens=tokens, log_probabilities=torch.cat(found, dim=1), evaluations=evaluations / count)
