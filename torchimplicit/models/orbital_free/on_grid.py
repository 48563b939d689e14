"""A density basis on a quadrature grid, a block of points at a time, within a stated memory."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, final

import torch
from torch import Tensor

from torchimplicit.models.orbital_free.basis import DensityBasis, Shells

POINTS = 1024
"""Number of points in a block, whose values stay in the processor's cache."""

NOUGHT = 1e-10
"""A function that is less at all points of a block, with its derivatives, is left out there: a hundredth of a
millionth of where a density's positive part is rounded off."""


@final
class Memory:
    """How much the values of basis functions may take, of all grids that share it.

    Where there is no room, the grid that has not been used for longest gives up its own; what does not fit even then is
    evaluated anew whenever it is needed.

    Attributes:
        limit: in bytes.
        single: keep values in single precision, in half the room; all that is computed with them stays double. Values
            that are evaluated again are rounded to single precision too, so that there is one map, with exact
            derivatives.
    """

    def __init__(self, limit: float, single: bool = False):
        self.limit, self.single = limit, single
        self._grids: dict[weakref.ref[OnGrid], None] = {}

    @property
    def used(self) -> int:
        """In bytes."""
        return sum(grid.held for ref in self._grids if (grid := ref()) is not None)

    @contextmanager
    def limited(self, limit: float, single: bool = False) -> Iterator[None]:
        """Within it there are so many bytes; see the attributes."""
        before = self.limit, self.single
        self.limit, self.single = limit, single
        try:
            yield
        finally:
            self.limit, self.single = before

    def touch(self, grid: OnGrid) -> None:
        """It is being used."""
        ref = weakref.ref(grid, self._forget)
        self._grids.pop(ref, None)
        self._grids[ref] = None

    def take(self, grid: OnGrid, size: int) -> bool:
        """Return whether there is room for a grid that is being used, or room has been made."""
        if grid.held + size > self.limit:
            return False
        for ref in list(self._grids):
            other = ref()
            if self.used + size <= self.limit:
                break
            if other is not None and other is not grid:
                other.drop()
        return True

    def _forget(self, ref: weakref.ref[OnGrid]) -> None:
        self._grids.pop(ref, None)


SHARED = Memory(2**30)
"""Default memory, shared by all molecules of a process."""


@dataclass(frozen=True, eq=False)
class Block:
    """Some of a grid's points; to be used before the next block is asked for, which may be written over it.

    Attributes:
        points: which.
        functions: those that are not nought there, ``[k]``.
        values: theirs, and their derivatives in x, y, z, ``[k, 4, points]``.
    """

    points: slice
    functions: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class Place:
    """A block before it is evaluated.

    Attributes:
        points: which.
        shells: those that are not nought there.
    """

    points: slice
    shells: Shells


@final
class OnGrid:
    """A basis at the points of a grid: a linear map of coefficients to the density and its slopes.

    ``on_grid(p)``, of coefficients ``[n]``, is ``[4, points]``: the density, then its derivatives in x, y, z. It can be
    differentiated to any order, in reverse and forward mode, and under ``torch.func.vmap``. Iterating goes through the
    blocks.

    Attributes:
        size: how many functions there are, n.
        length: how many points.
        places: the blocks, before they are evaluated.
    """

    def __init__(self, basis: DensityBasis, points: Tensor, memory: Memory = SHARED):
        self._source: tuple[DensityBasis, Tensor] | None = (basis, points)
        self._memory: Memory | None = memory
        self._kept: dict[int, Tensor] = {}
        self.size, self.length = int(basis.sizes.sum()), len(points)
        self.places = _placed(basis, points)

    @classmethod
    def of(cls, values: Tensor, gradients: Tensor) -> Self:
        """Make it from arrays that are held whole.

        Args:
            values: the functions, ``[points, n]``.
            gradients: their derivatives in x, y, z, ``[3, points, n]``.
        """
        grid = cls.__new__(cls)
        grid._source = grid._memory = None
        grid.length, grid.size = values.shape
        every = torch.arange(grid.size, device=values.device)
        grid.places = [Place(slice(0, grid.length), Shells(every[:0], every, []))]
        grid._kept = {0: torch.cat((values[None], gradients)).permute(2, 0, 1).contiguous()}
        return grid

    def __iter__(self) -> Iterator[Block]:
        room: list[Tensor] = []
        if self._memory is not None:
            self._memory.touch(self)
        for number, place in enumerate(self.places):
            yield Block(place.points, place.shells.functions, self._values(number, place, room))

    def __call__(self, p: Tensor) -> Tensor:
        fields: Tensor = _Linear.apply(self, False, p)
        return fields

    def __getstate__(self) -> dict[str, Any]:  # another process evaluates what it needs, within its own memory
        return vars(self) if self._source is None else {"_source": self._source}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["_source"] is None:
            vars(self).update(state)
        else:
            OnGrid.__init__(self, *state["_source"])

    @property
    def held(self) -> int:
        """Bytes of the values that are kept."""
        return sum(values.nbytes for values in self._kept.values())

    def drop(self) -> None:
        """Keep no values any more."""
        self._kept.clear()

    def dense(self) -> tuple[Tensor, Tensor]:
        """The values ``[points, n]`` and derivatives ``[3, points, n]``, assembled; see :meth:`of`."""
        whole = torch.cat(
            [
                block.values.new_zeros(self.size, *block.values.shape[1:]).index_copy(0, block.functions, block.values)
                for block in self
            ],
            dim=2,
        )
        return whole[:, 0].T, whole[:, 1:].permute(1, 2, 0)

    def to(self, *, dtype: torch.dtype | None = None, device: Any = None) -> OnGrid:
        """Return the same in another precision or on another device."""
        if self._source is None:
            return OnGrid.of(*(t.to(device=device, dtype=dtype) for t in self.dense()))
        basis, points = self._source
        return OnGrid(
            basis.to(dtype=dtype, device=device), points.to(dtype=dtype, device=device), self._memory or SHARED
        )

    def products(self, weights: Tensor) -> Tensor:
        """:math:`\\sum_{kl}\\Phi_k^T\\,\\mathrm{diag}(w_{kl})\\,\\Phi_l`, ``[n, n]``, where :math:`\\Phi_0` are the
        functions at the points, and :math:`\\Phi_1` to :math:`\\Phi_3` their derivatives.

        Args:
            weights: ``[m, m, points]``, symmetric; of the functions alone (m = 1) or of all (m = 4).
        """
        total = weights.new_zeros(self.size, self.size)
        for block in self:
            values = block.values[:, : len(weights)].to(weights)
            there = weights[..., block.points]
            part = values.new_zeros(len(values), len(values))
            for k, row in enumerate(there):
                weighted = values[:, 0] * row[0]
                for l in range(1, len(row)):
                    weighted.addcmul_(values[:, l], row[l])
                part.addmm_(values[:, k], weighted.T)
            total[block.functions[:, None], block.functions] += part
        return total

    def gathered(self, of_points: Tensor) -> Tensor:
        """The transposed map, of some columns.

        Args:
            of_points: ``[..., 4, points]``.

        Returns:
            ``[..., n]``.
        """
        total = of_points.new_zeros(*of_points.shape[:-2], self.size)
        for block in self:
            there = of_points[..., block.points].flatten(-2) @ block.values.flatten(1).T.to(of_points)
            total.index_add_(-1, block.functions, there)
        return total

    def spread(self, p: Tensor) -> Tensor:
        """The map itself, of coefficients ``[..., n]`` to ``[..., 4, points]``."""
        fields = p.new_empty(*p.shape[:-1], 4, self.length)
        for block in self:
            there = p[..., block.functions] @ block.values.flatten(1).to(p)
            fields[..., block.points] = there.unflatten(-1, (4, -1))
        return fields

    @torch.no_grad()
    def _values(self, number: int, place: Place, room: list[Tensor]) -> Tensor:
        """Kept, or evaluated into ``room``, which is made where there is none yet."""
        block: Tensor | None = self._kept.get(number)
        if block is not None:
            return block
        assert self._source is not None
        assert self._memory is not None
        basis, points = self._source
        there = points[place.points]
        if not room:
            room.append(points.new_empty(4 * len(there) * max(len(one.shells.functions) for one in self.places)))
        shape = (len(place.shells.functions), 4, len(there))
        block = basis.jets(there, place.shells, out=room[0][: math.prod(shape)].view(shape))
        if self._memory.single:
            block = block.float()
        if self._memory.take(self, block.nbytes):
            block = self._kept[number] = block.clone()
        return block


def _placed(basis: DensityBasis, points: Tensor) -> list[Place]:
    """The blocks of a grid, whose points are near each other where they follow each other."""
    parts = [slice(start, min(start + POINTS, len(points))) for start in range(0, len(points), POINTS)]
    distances = torch.stack([torch.cdist(points[part], basis.centres).amin(dim=0) for part in parts])
    numbers = torch.arange(len(basis.atom), device=points.device)
    reaching = basis.reaching(distances, NOUGHT)
    return [Place(part, basis.some(numbers[near])) for part, near in zip(parts, reaching, strict=True)]


class _Linear(torch.autograd.Function):
    """The map, or its transpose: the derivative of each in reverse mode is the other, and in forward mode itself."""

    @staticmethod
    def forward(on_grid: OnGrid, transposed: bool, x: Tensor) -> Tensor:
        return on_grid.gathered(x) if transposed else on_grid.spread(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        ctx.on_grid, ctx.transposed, _ = inputs

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        return None, None, _Linear.apply(ctx.on_grid, not ctx.transposed, slope)

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, tangent: Tensor) -> Any:
        return _Linear.apply(ctx.on_grid, ctx.transposed, tangent)

    @staticmethod
    def vmap(info: Any, in_dims: Any, on_grid: OnGrid, transposed: bool, x: Tensor) -> Any:
        return _Linear.apply(on_grid, transposed, x.movedim(in_dims[2], 0)), 0
