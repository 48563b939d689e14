"""Fixed-point correction: a loss on the way to the solution as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchimplicit.solution import Solution
from torchimplicit.validation import at_least


def fixed_point_correction(
    solution: Solution,
    loss: Callable[[Any], Tensor],
    *,
    count: int = 4,
    gamma: float = 0.8,
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
        random: whether the indices are drawn at random, without repetition, rather than evenly spaced.
        generator: for the indices; ``None``: the global one.

    Returns:
        a scalar, the loss of the solution included.
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"fixed_point_correction: gamma is {gamma}, and must lie in (0, 1]")
    if solution.value is None:
        raise ValueError(
            "fixed_point_correction needs the iterates, and this solution holds figures alone, as an Equilibrium keeps "
            "them in its attribute solution, lest a graph stay in memory: whatever its solver keeps is gone. Solve by "
            "torchimplicit.solve(FixedPoint(cell), z0, x, solver=Anderson(keep_trajectory=True)), and give what it "
            "returns"
        )
    if not solution.trajectory or solution._attach is None:
        raise ValueError(
            "fixed_point_correction needs the iterates: solve with a solver that has keep_trajectory=True, for example "
            "Anderson(keep_trajectory=True)"
        )
    indices = chosen_iterates(solution, count, random=random, generator=generator)
    states = [solution._attach(i) for i in indices] + [solution.value]
    terms = [loss(state) for state in states]
    if any(not isinstance(term, Tensor) or term.ndim for term in terms):
        raise ValueError("fixed_point_correction: the loss must return a scalar tensor")
    weights = [gamma ** (len(terms) - 1 - k) for k in range(len(terms))]
    return torch.stack([weight * term for weight, term in zip(weights, terms, strict=True)]).sum()


def chosen_iterates(
    solution: Solution, count: int, *, random: bool = False, generator: torch.Generator | None = None
) -> list[int]:
    """Which iterates of the trajectory :func:`fixed_point_correction` takes beside the solution, in their order.

    Args:
        count: n, the solution included.
        random: whether they are drawn at random, without repetition, rather than evenly spaced.
        generator: for that; ``None``: the global one.
    """
    at_least("fixed_point_correction", "count", count, 1)
    between = len(solution.trajectory) - 2  # the start is not an iterate of the map, the last is the solution
    wanted = min(count - 1, max(between, 0))
    if random:
        return (torch.randperm(between, generator=generator)[:wanted].sort().values + 1).tolist() if wanted else []
    return [round((k + 1) * (between + 1) / (wanted + 1)) for k in range(wanted)]
