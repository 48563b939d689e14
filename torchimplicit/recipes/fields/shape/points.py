"""A mesh as points to fit: where they are, and what is known there."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, final

import torch
from torch import Tensor

from torchimplicit.recipes.fields.points import Points
from torchimplicit.recipes.fields.shape.config import LONGEST
from torchimplicit.recipes.fields.shape.mesh import Mesh, sample
from torchimplicit.recipes.fields.shape.tree import MeshTree
from torchimplicit.recipes.fields.task import Parts
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.task import generator

TaskName = Literal["occupancy", "sdf"]
MARGIN = 0.1
"""Left around it on every side."""

NEAR = (0.01, 0.05)
"""Standard deviations of the points near the surface, for one half of them each."""


@dataclass(frozen=True)
class Frame:
    """Where the field's coordinates lie in those of the file: ``file = centre + scale * field``."""

    centre: Tensor
    scale: float

    @staticmethod
    def of(mesh: Mesh) -> Frame:
        """That in which the mesh's box is in the middle and its longest side is :data:`LONGEST`."""
        low, high = mesh.vertices.amin(0), mesh.vertices.amax(0)
        return Frame((low + high) / 2, float((high - low).max()) / LONGEST)

    def inward(self, mesh: Mesh) -> Mesh:
        """A mesh of the file in the field's coordinates."""
        return Mesh((mesh.vertices - self.centre) / self.scale, mesh.faces)

    def outward(self, mesh: Mesh) -> Mesh:
        """The inverse."""
        return Mesh(mesh.vertices * self.scale + self.centre, mesh.faces)


@final
class ShapePoints(Points):
    """Points around a mesh.

    Args:
        corner: of the domain.
        coordinates: ``[points, 3]``.
        values: ``[points, k]``. For occupancy k is 2: 1 inside and 0 outside; and whether the point was drawn near the
            surface. For the distance it is 5: the distance, negative inside; its gradient, which is the normal on the
            surface; and the same.
    """

    coordinates: Tensor
    values: Tensor
    inputs = 3
    outputs = 1

    def __init__(self, corner: tuple[float, ...], coordinates: Tensor, values: Tensor):
        super().__init__()
        self.corner = corner
        self.register_buffer("coordinates", coordinates.float(), persistent=False)
        self.register_buffer("values", values.float(), persistent=False)

    def __len__(self) -> int:
        return len(self.coordinates)

    def at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        index = index.to(self.coordinates.device)
        return self.coordinates[index], self.values[index]


@dataclass(frozen=True)
class Counts:
    """How many points: to train on, and to validate and to test on each."""

    training: int
    held_out: int


def drawn(mesh: Mesh, tree: MeshTree, task: TaskName, counts: Counts, seed: int) -> tuple[ShapePoints, Parts]:
    """Points around a mesh in the field's coordinates: half of them near the surface, half anywhere in the domain; for
    the distance, a third of those to train on lies on the surface itself.

    Raises:
        UserError: if nothing is inside.
    """
    half = (mesh.vertices.amax(0) - mesh.vertices.amin(0)) / 2
    corner = half + MARGIN
    random = generator(seed, -11)
    on = counts.training // 3 if task == "sdf" else 0
    pieces = []
    for count, surface in ((counts.training, on), (counts.held_out, 0), (counts.held_out, 0)):
        near = (count - surface) // 2
        anywhere = (2 * torch.rand(count - surface - near, 3, generator=random, dtype=torch.float64) - 1) * corner
        found = sample(mesh, near + surface, random)
        off = torch.randn(near + surface, 3, generator=random, dtype=torch.float64)
        off[: near // 2] *= NEAR[0]
        off[near // 2 : near] *= NEAR[1]
        off[near:] = 0
        beside = torch.maximum(torch.minimum(found.points + off, corner), -corner)
        x = torch.cat([anywhere, beside])
        flag = torch.cat([torch.zeros(len(anywhere)), torch.ones(len(beside))])
        if task == "occupancy":
            values = tree.winding(x).gt(0.5).double()[:, None]
        else:
            values = _distances(mesh, tree, x)
            if surface:
                values[-surface:, 0] = 0
                values[-surface:, 1:] = mesh.normals()[found.faces[-surface:]]
        pieces.append((x, torch.cat([values, flag[:, None]], 1)))
    x, values = (torch.cat(found) for found in zip(*pieces, strict=True))
    points = ShapePoints(tuple(corner.tolist()), x, values)
    inside = values[:, 0] > 0.5 if task == "occupancy" else values[:, 0] < 0
    if inside.double().mean() < 1e-4:
        raise UserError("nothing is inside this surface; it may be a sheet, or holes may open it; close it first")
    bounds = [0, counts.training, counts.training + counts.held_out, counts.training + 2 * counts.held_out]
    return points, Parts(*(torch.arange(a, b) for a, b in pairwise(bounds)))


def _distances(mesh: Mesh, tree: MeshTree, x: Tensor) -> Tensor:
    """The signed distance and its gradient, ``[points, 4]``."""
    distance, nearest, face = tree.closest(x)
    sign = torch.where(tree.winding(x) > 0.5, -1.0, 1.0).double()
    slope = sign[:, None] * (x - nearest) / distance[:, None].clamp_min(1e-300)
    slope = torch.where(distance[:, None] > 1e-9, slope, mesh.normals()[face])
    return torch.cat([(sign * distance)[:, None], slope], 1)
