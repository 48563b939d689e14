"""Triangle meshes, what is checked of them, and points on them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from torchimplicit.recipes.runtime.errors import UserError


@dataclass(frozen=True)
class Mesh:
    """A surface of triangles.

    Attributes:
        vertices: float64 ``[vertices, 3]``.
        faces: int64 ``[faces, 3]``, counter-clockwise as seen from outside.
    """

    vertices: Tensor
    faces: Tensor

    @property
    def corners(self) -> Tensor:
        """``[faces, 3, 3]``: face, corner, coordinate."""
        return self.vertices[self.faces]

    @property
    def crosses(self) -> Tensor:
        """``[faces, 3]``: the outward normals, twice as long as the faces are large."""
        a, b, c = self.corners.unbind(1)
        return torch.linalg.cross(b - a, c - a)

    @property
    def area(self) -> float:
        """Of all faces."""
        return float(self.crosses.norm(dim=1).sum() / 2)

    @property
    def volume(self) -> float:
        """Enclosed by a closed surface; negative if it is turned inside out."""
        return float((self.corners[:, 0] * self.crosses).sum() / 6)

    def normals(self) -> Tensor:
        """Of the faces, outward unit vectors; zero for a face without area."""
        return torch.nn.functional.normalize(self.crosses, dim=1, eps=1e-300)

    def vertex_normals(self) -> Tensor:
        """``[vertices, 3]``: means of the faces' normals, weighted by area."""
        total = torch.zeros_like(self.vertices)
        total.index_add_(0, self.faces.flatten(), self.crosses.repeat_interleave(3, dim=0))
        return torch.nn.functional.normalize(total, dim=1, eps=1e-300)


@dataclass(frozen=True)
class Samples:
    """Points spread evenly over a surface.

    Attributes:
        points: ``[points, 3]``.
        faces: int64 ``[points]``, on which face each is.
        weights: ``[points, 3]``, barycentric.
    """

    points: Tensor
    faces: Tensor
    weights: Tensor


def sample(mesh: Mesh, count: int, generator: torch.Generator) -> Samples:
    """Points on the surface, uniform by area."""
    areas = mesh.crosses.norm(dim=1).cumsum(0)
    places = torch.rand(count, generator=generator, dtype=torch.float64) * areas[-1]
    faces = torch.searchsorted(areas, places, right=True).clamp_(max=len(areas) - 1)
    u, v = torch.rand(2, count, generator=generator, dtype=torch.float64)
    root = u.sqrt()
    weights = torch.stack([1 - root, root * (1 - v), root * v], 1)
    return Samples((mesh.corners[faces] * weights[:, :, None]).sum(1), faces, weights)


def section(mesh: Mesh, axis: int) -> Tensor:
    """Where the plane through the origin across an axis cuts the surface: segments ``[segments, 2, 3]``."""
    above = mesh.corners[:, :, axis] > 0
    cut = above.any(1) & ~above.all(1)
    above, corners = above[cut], mesh.corners[cut]
    alone = torch.where(above.sum(1) == 1, above.int().argmax(1), (~above).int().argmax(1))
    tip, *others = (
        corners.gather(1, ((alone + turn) % 3)[:, None, None].expand(-1, 1, 3)).squeeze(1) for turn in range(3)
    )
    height = tip[:, axis, None]
    return torch.stack([tip + (one - tip) * height / (height - one[:, axis, None]) for one in others], 1)


@dataclass(frozen=True)
class Edges:
    """How a surface's faces meet.

    Attributes:
        open: edges of one face only.
        crowded: edges of three faces and more.
        turned: edges along which two faces are turned against each other.
    """

    open: int
    crowded: int
    turned: int

    @staticmethod
    def of(mesh: Mesh) -> Edges:
        """Count them."""
        directed = mesh.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)
        keys = directed.sort(dim=1).values @ torch.tensor([len(mesh.vertices), 1])
        forward = torch.where(directed[:, 0] < directed[:, 1], 1, -1)
        _, place, count = keys.unique(return_inverse=True, return_counts=True)
        balance = torch.zeros_like(count).index_add_(0, place, forward)
        return Edges(
            open=int((count == 1).sum()),
            crowded=int((count > 2).sum()),
            turned=int(((count == 2) & (balance != 0)).sum()),
        )


def prepared(mesh: Mesh, name: str) -> tuple[Mesh, tuple[str, ...]]:
    """A mesh that was read, made fit for use, and what a person who gave it should know.

    Raises:
        UserError: if it describes no solid at all.
    """
    notes: list[str] = []
    if not torch.isfinite(mesh.vertices).all():
        raise UserError(f"{name} holds vertices that are NaN or infinite; repair it first")
    if len(mesh.faces) and not 0 <= int(mesh.faces.min()) <= int(mesh.faces.max()) < len(mesh.vertices):
        raise UserError(f"{name} has faces that name vertices which are not there; the file may be damaged")
    mesh = _merged(mesh)
    extent = (mesh.vertices.amax(0) - mesh.vertices.amin(0)).max() if len(mesh.vertices) else torch.tensor(0.0)
    whole = mesh.crosses.norm(dim=1) > 1e-14 * extent.square()
    if not whole.any():
        raise UserError(f"{name} has no faces with an area; give a surface of triangles, not points or lines")
    if not whole.all():
        notes.append(f"without {int((~whole).sum())} faces that have no area")
        mesh = _merged(replace(mesh, faces=mesh.faces[whole]))
    edges = Edges.of(mesh)
    if edges.turned:
        mesh = _oriented(mesh)
        edges = Edges.of(mesh)
        notes.append(
            "its faces turned to agree"
            if not edges.turned
            else f"with {edges.turned} edges where faces are turned against each other, near which the inside is unsure"
        )
    if edges.open or edges.crowded:
        found = [f"{count} {kind} edges" for count, kind in ((edges.open, "open"), (edges.crowded, "crowded")) if count]
        notes.append(f"not watertight ({', '.join(found)}): inside is where its winding number is over one half")
    if mesh.volume < 0:
        mesh = replace(mesh, faces=mesh.faces.flip(1))
        notes.append("turned outside out, for its volume was negative")
    return mesh, tuple(notes)


def _merged(mesh: Mesh) -> Mesh:
    """Vertices that are used, each once."""
    used, places = mesh.faces.flatten().unique(return_inverse=True)
    vertices, again = np.unique(mesh.vertices[used].numpy(), axis=0, return_inverse=True)
    faces = torch.from_numpy(again.reshape(-1))[places]
    return Mesh(torch.from_numpy(vertices), faces.reshape(-1, 3).long())


def _oriented(mesh: Mesh) -> Mesh:
    """Neighbours turned alike, by trimesh, as far as the surface allows."""
    import trimesh

    other = trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False)
    trimesh.repair.fix_winding(other)
    return Mesh(mesh.vertices, torch.from_numpy(np.array(other.faces, dtype=np.int64)))
