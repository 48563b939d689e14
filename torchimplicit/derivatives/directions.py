"""Directions in the arguments of a problem, in flat coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit.flat_problem import FlatProblem


def flat_direction(flat: FlatProblem, direction: Any, block: bool) -> list[Tensor | None]:
    """A tangent for each parameter of the flat problem, ``None`` for those that do not move.

    Args:
        flat: the flat problem.
        direction: one entry for each argument of the problem.
        block: whether every tensor has several directions in an additional first dimension.

    Raises:
        ValueError, TypeError: the direction does not fit the arguments.
    """
    args = flat.closure.args
    if not isinstance(direction, tuple | list) or len(direction) != len(args):
        raise ValueError(
            f"a direction has one entry for each of the problem's {len(args)} arguments, None for one that does not "
            f"move, but this one is {_described(direction)}"
        )
    tangents: list[Tensor | None] = []
    for number, (arg, entry) in enumerate(zip(args, direction, strict=True)):
        leaves, spec = pytree.tree_flatten(arg)
        if entry is None:
            tangents += [None for leaf in leaves if isinstance(leaf, Tensor)]
            continue
        entries, entry_spec = pytree.tree_flatten(entry)
        if entry_spec != spec:
            raise ValueError(
                f"the direction's entry {number} has the structure {entry_spec}, but the argument has {spec}"
            )
        for leaf, tangent in zip(leaves, entries, strict=True):
            if isinstance(leaf, Tensor):
                tangents.append(_fitting(number, leaf, tangent, block))
    if all(tangent is None for tangent in tangents):
        raise ValueError("no argument moves: give a tangent for at least one")
    sizes = {len(tangent) for tangent in tangents if tangent is not None} if block else {1}
    if len(sizes) > 1:
        raise ValueError(f"the direction's entries hold different numbers of directions: {sorted(sizes)}")
    # the parameters after those of the arguments are captured tensors, which do not move
    return tangents + [None] * (len(flat.params) - len(tangents))


def _fitting(number: int, leaf: Tensor, tangent: Any, block: bool) -> Tensor:
    if not isinstance(tangent, Tensor):
        raise TypeError(f"the direction's entry {number} must be a tensor like the argument, not {_described(tangent)}")
    shape = tangent.shape[1:] if block else tangent.shape
    if shape != leaf.shape or tangent.dtype != leaf.dtype:
        expected = ("[k, " if block else "[") + ", ".join(map(str, leaf.shape)) + "]"
        raise ValueError(
            f"the direction's entry {number} is {tangent.dtype} of shape {list(tangent.shape)}, but must be "
            f"{leaf.dtype} of shape {expected} like the argument"
        )
    return tangent


def _described(value: Any) -> str:
    return f"of length {len(value)}" if isinstance(value, tuple | list) else repr(value)


@dataclass(frozen=True)
class Basis:
    """The unit directions of one tensor argument; if it carries the batch, of the entries of one sample.

    Attributes:
        flat: the flat problem.
        place: the place of the argument among the parameters of the flat problem.
        tensor: the argument.
        batched: whether it carries the batch, so that one direction moves the same entry of every sample.
        moves: the directions, ``[p, *tensor.shape]``.
    """

    flat: FlatProblem
    place: int
    tensor: Tensor
    batched: bool
    moves: Tensor

    @property
    def shape(self) -> torch.Size:
        """The shape of one sample of the argument, if it carries the batch, else of the whole argument."""
        return self.tensor.shape[1:] if self.batched else self.tensor.shape

    @property
    def lead(self) -> torch.Size:
        """The dimensions before :attr:`shape`: the batch, or none."""
        return self.tensor.shape[:1] if self.batched else torch.Size()

    @property
    def count(self) -> int:
        """p, the number of directions."""
        return len(self.moves)

    @property
    def directions(self) -> list[Tensor | None]:
        """All unit directions, in the form that :func:`flat_direction` gives a block."""
        return self.direction(self.moves)

    def direction(self, tangent: Tensor) -> list[Tensor | None]:
        """The direction in which only this argument moves, along ``tangent``."""
        return [tangent if place == self.place else None for place in range(len(self.flat.params))]

    def replaced(self, a: Tensor) -> tuple[Tensor, ...]:
        """The parameters with ``a`` in place of the argument."""
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
    """The unit directions of the argument with number ``argument``.

    Raises:
        ValueError: there is no such argument, or it is not a floating-point tensor.
    """
    args = flat.closure.args
    if not 0 <= argument < len(args):
        raise ValueError(f"argument is {argument}, but the problem has the arguments 0 to {len(args) - 1}")
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
