"""Directions in the arguments of a problem, in flat coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit.flat_problem import FlatProblem


def flat_direction(flat: FlatProblem, direction: Any, block: bool) -> list[Tensor | None]:
    """A tangent for each parameter of the statement, ``None`` for those that do not move.

    Args:
        flat: what the direction is for.
        direction: one entry for each argument.
        block: whether every tensor has several directions in a dimension before its own.

    Raises:
        ValueError, TypeError: it does not fit the arguments.
    """
    args = flat.closure.args
    if not isinstance(direction, tuple | list) or len(direction) != len(args):
        raise ValueError(
            f"a direction has one entry for each of the problem's {len(args)} arguments, None for one that does not "
            f"move, and this one is {_said(direction)}"
        )
    found: list[Tensor | None] = []
    for number, (arg, entry) in enumerate(zip(args, direction, strict=True)):
        leaves, spec = pytree.tree_flatten(arg)
        if entry is None:
            found += [None for leaf in leaves if isinstance(leaf, Tensor)]
            continue
        tangents, own = pytree.tree_flatten(entry)
        if own != spec:
            raise ValueError(f"the direction's entry {number} has the structure {own}, and the argument has {spec}")
        for leaf, tangent in zip(leaves, tangents, strict=True):
            if isinstance(leaf, Tensor):
                found.append(_fitting(number, leaf, tangent, block))
    if all(tangent is None for tangent in found):
        raise ValueError("no argument moves: give a tangent for at least one")
    sizes = {len(tangent) for tangent in found if tangent is not None} if block else {1}
    if len(sizes) > 1:
        raise ValueError(f"the direction's entries hold different numbers of directions: {sorted(sizes)}")
    return found + [None] * (len(flat.params) - len(found))


def _fitting(number: int, leaf: Tensor, tangent: Any, block: bool) -> Tensor:
    if not isinstance(tangent, Tensor):
        raise TypeError(f"the direction's entry {number} must be a tensor like the argument, not {_said(tangent)}")
    shape = tangent.shape[1:] if block else tangent.shape
    if shape != leaf.shape or tangent.dtype != leaf.dtype:
        expected = ("[k, " if block else "[") + ", ".join(map(str, leaf.shape)) + "]"
        raise ValueError(
            f"the direction's entry {number} is {tangent.dtype} of {list(tangent.shape)}, and the argument wants "
            f"{leaf.dtype} of {expected}"
        )
    return tangent


def _said(value: Any) -> str:
    return f"of length {len(value)}" if isinstance(value, tuple | list) else repr(value)


@dataclass(frozen=True)
class Basis:
    """The unit directions of one tensor argument: of each sample's entries, where it carries the batch.

    Attributes:
        flat: the statement.
        place: which of the statement's parameters the argument is.
        tensor: the argument.
        batched: whether it carries the batch, so that one direction moves the same entry of every sample.
        moves: ``[p, *tensor.shape]``.
    """

    flat: FlatProblem
    place: int
    tensor: Tensor
    batched: bool
    moves: Tensor

    @property
    def shape(self) -> torch.Size:
        """Of one sample, or of the whole."""
        return self.tensor.shape[1:] if self.batched else self.tensor.shape

    @property
    def lead(self) -> torch.Size:
        """What stands before: the batch, or nothing."""
        return self.tensor.shape[:1] if self.batched else torch.Size()

    @property
    def count(self) -> int:
        """p, the number of directions."""
        return len(self.moves)

    @property
    def directions(self) -> list[Tensor | None]:
        """All of them, as :func:`flat_direction` gives a block."""
        return self.direction(self.moves)

    def direction(self, tangent: Tensor) -> list[Tensor | None]:
        """A tangent of this argument alone."""
        return [tangent if place == self.place else None for place in range(len(self.flat.params))]

    def replaced(self, a: Tensor) -> tuple[Tensor, ...]:
        """The parameters with ``a`` for the argument."""
        return tuple(a if place == self.place else p for place, p in enumerate(self.flat.params))

    def per_sample(self, cotangent: Tensor) -> Tensor:
        """A cotangent of the argument as ``[batch, p]``; only where it carries the batch, or the batch is one."""
        return cotangent.reshape(self.flat.z0.shape[0] if self.batched else 1, -1)

    def contracted(self, left: Tensor, right: Tensor) -> Tensor:
        """Inner products of ``[p, batch, ...]`` with ``[p, batch, ...]``: ``[batch, p, p]``, or ``[p, p]``."""
        if self.batched:
            p, batch = left.shape[:2]
            return torch.einsum("ibn,jbn->bij", left.reshape(p, batch, -1), right.reshape(p, batch, -1))
        return left.flatten(1) @ right.flatten(1).T


def basis(flat: FlatProblem, argument: int) -> Basis:
    """The unit directions of the argument of that number.

    Raises:
        ValueError: there is no such argument, or it is no floating-point tensor.
    """
    args = flat.closure.args
    if not 0 <= argument < len(args):
        raise ValueError(f"argument is {argument}, and the problem has the arguments 0 to {len(args) - 1}")
    if not isinstance(args[argument], Tensor) or not args[argument].is_floating_point():
        raise ValueError(f"argument {argument} must be a floating-point tensor, not {type(args[argument]).__name__}")
    place = sum(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(args[:argument]))
    tensor = flat.params[place]
    batch = flat.z0.shape[0]
    batched = flat.problem.batched and tensor.ndim > 0 and tensor.shape[0] == batch
    inner = tensor.shape[1:] if batched else tensor.shape
    count = inner.numel()
    eye = torch.eye(count, dtype=tensor.dtype, device=tensor.device).reshape(count, *inner)
    moves = eye[:, None].expand(count, *tensor.shape).contiguous() if batched else eye
    return Basis(flat, place, tensor, batched, moves)
