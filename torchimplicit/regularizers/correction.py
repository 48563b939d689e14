"""Fixed-point correction: a loss on the way to the solution as well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchimplicit.solution import Solution


def fixed_point_correction(
    solution: Solution,
    loss: Callable[[Any], Tensor],
    *,
    count: int = 4,
    gamma: float = 0.8,
    weights: Sequence[float] | Tensor | None = None,
    reduce: bool = True,
    random: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """:math:`\\sum_{k=1}^n \\gamma^{n-k} L(p_{i_k})` over ``count`` iterates, the last being the solution.

    Each iterate is treated as the solution by the gradient estimator of the solve (Bai et al. 2022, "Deep equilibrium
    optical flow estimation"), so the term asks that the iteration reach a good value early.

    Args:
        solution: of a solver with ``keep_trajectory=True``.
        loss: of a state with the structure of ``z0``; returns a scalar.
        count: n. A shorter trajectory gives as many terms as it has iterates.
        gamma: in (0, 1].
        weights: of the ``count`` losses, in place of the powers of gamma; where there are fewer, the last of them.
        reduce: ``False``: the single losses are returned, without weights.
        random: whether the indices are drawn at random, without repetition, rather than evenly spaced.
        generator: for the indices; ``None``: the global one.

    Returns:
        a scalar, the loss of the solution included; ``[terms]`` with ``reduce=False``. A loss with other
        arguments, or one for each state, is a line with :meth:`~torchimplicit.Solution.states`.
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"fixed_point_correction: gamma is {gamma}, and must lie in (0, 1]")
    states = solution.states(count, random=random, generator=generator)
    terms = [loss(state) for state in states]
    if any(not isinstance(term, Tensor) or term.ndim for term in terms):
        raise ValueError("fixed_point_correction: the loss must return a scalar tensor")
    single = torch.stack(terms)
    if not reduce:
        return single
    if weights is None:
        weights = [gamma ** (count - 1 - k) for k in range(count)]
    if len(weights) != count:
        raise ValueError(f"fixed_point_correction: {len(weights)} weights were given for count={count} losses")
    given = torch.as_tensor(weights, dtype=single.dtype, device=single.device)
    return (given[count - len(terms) :] * single).sum()
