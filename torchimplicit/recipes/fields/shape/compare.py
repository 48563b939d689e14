"""How far a surface is from the true one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchimplicit.recipes.fields.shape.config import LONGEST
from torchimplicit.recipes.fields.shape.mesh import Edges, Mesh, sample
from torchimplicit.recipes.fields.shape.tree import MeshTree

SAMPLES = 10000


@dataclass(frozen=True)
class Comparison:
    """A surface beside the true one; lengths are shares of the true mesh's longest side.

    Attributes:
        chamfer: the mean of the two next.
        to_truth: mean distance of the surface's points to the true one.
        from_truth: mean distance of the true surface's points to it.
        normals: mean absolute cosine between the normals of a point and of its nearest one, both ways.
        vertices, faces: of the surface.
        watertight: whether every edge has two faces.
        volume: over the true one's.
    """

    chamfer: float
    to_truth: float
    from_truth: float
    normals: float
    vertices: int
    faces: int
    watertight: bool
    volume: float


def compared(mesh: Mesh, truth: Mesh, tree: MeshTree, seed: int = 0) -> Comparison:
    """Both in the field's coordinates; ``tree`` is the truth's. Distances are from points on one surface to the other
    surface itself, so that there is no floor of the sampling."""
    random = torch.Generator().manual_seed(seed)
    ways = []
    for one, other, at in ((mesh, truth, tree), (truth, mesh, MeshTree(mesh))):
        found = sample(one, SAMPLES, random)
        distance, _, face = at.closest(found.points)
        cosine = (one.normals()[found.faces] * other.normals()[face]).sum(1).abs()
        ways.append((float(distance.mean()) / LONGEST, float(cosine.mean())))
    (to, own), (back, others) = ways
    edges = Edges.of(mesh)
    return Comparison(
        chamfer=(to + back) / 2,
        to_truth=to,
        from_truth=back,
        normals=(own + others) / 2,
        vertices=len(mesh.vertices),
        faces=len(mesh.faces),
        watertight=edges.open == 0 and edges.crowded == 0,
        volume=mesh.volume / truth.volume,
    )
