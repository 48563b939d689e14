"""Fixed-point correction: the loss of several iterates besides the solution."""

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
    """The sum :math:`\\sum_{k=1}^n \\gamma^{n-k} L(p_{i_k})` of losses over ``count`` iterates, the last of which is
    the solution.

    The gradient estimator of the solve treats each iterate as the solution (Bai et al. 2022, "Deep equilibrium optical
    flow estimation"). The sum is small if the iteration reaches a good value early. For a loss with other arguments, or
    a different one for each iterate, use :meth:`~torchimplicit.Solution.states`.

    Args:
        solution: the solution of a solver with ``keep_trajectory=True``.
        loss: a function of a state with the structure of ``z0`` that returns a scalar.
        count: n. A shorter trajectory gives as many terms as it has iterates.
        gamma: the base of the weights, in (0, 1].
        weights: ``count`` weights in place of the powers of gamma; if there are fewer terms, the last weights are used.
        reduce: ``False``: the unweighted losses are returned.
        random: whether the indices are drawn at random, without repetition, rather than evenly spaced.
        generator: for the indices; ``None``: the global one.

    Returns:
        a scalar that includes the loss of the solution; ``[terms]`` with ``reduce=False``.

    Raises:
        ValueError: ``gamma`` is out of range, the loss is not a scalar tensor, the number of weights is not ``count``,
            or the solver did not keep its iterates.
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"fixed_point_correction: gamma is {gamma}, but must lie in (0, 1]")
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
    factors = torch.as_tensor(weights, dtype=single.dtype, device=single.device)
    return (factors[count - len(terms) :] * single).sum()
