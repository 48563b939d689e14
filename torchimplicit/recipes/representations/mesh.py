"""Triangle meshes: reading, generating, distances, extraction from a field, and drawing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import replacing, write_text

# -- Triangle meshes, what is checked of them, and points on them ------------------------------------------------------


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
        """``[faces, 3]``: outward normals, with twice the faces' area as length."""
        a, b, c = self.corners.unbind(1)
        return torch.linalg.cross(b - a, c - a)

    @property
    def area(self) -> float:
        """Total area of the faces."""
        return float(self.crosses.norm(dim=1).sum() / 2)

    @property
    def volume(self) -> float:
        """Volume enclosed by a closed surface; negative if it is inside out."""
        return float((self.corners[:, 0] * self.crosses).sum() / 6)

    def normals(self) -> Tensor:
        """Outward unit normals of the faces; zero for a face without area."""
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
    """Section of the surface by the plane through the origin perpendicular to an axis: segments ``[segments, 2,
    3]``."""
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
    """Statistics of how a surface's faces meet.

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
        """Count the edges."""
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
    """A mesh made fit for use, and notes for the person who supplied it.

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
        faults = [
            f"{count} {kind} edges" for count, kind in ((edges.open, "open"), (edges.crowded, "crowded")) if count
        ]
        notes.append(f"not watertight ({', '.join(faults)}): inside is where its winding number is over one half")
    if mesh.volume < 0:
        mesh = replace(mesh, faces=mesh.faces.flip(1))
        notes.append("turned outside out, for its volume was negative")
    return mesh, tuple(notes)


def _merged(mesh: Mesh) -> Mesh:
    """Merge equal vertices, dropping unused ones."""
    used, places = mesh.faces.flatten().unique(return_inverse=True)
    vertices, again = np.unique(mesh.vertices[used].numpy(), axis=0, return_inverse=True)
    faces = torch.from_numpy(again.reshape(-1))[places]
    return Mesh(torch.from_numpy(vertices), faces.reshape(-1, 3).long())


def _oriented(mesh: Mesh) -> Mesh:
    """Orient neighbouring faces consistently by trimesh, as far as the surface allows."""
    import trimesh

    other = trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False)
    trimesh.repair.fix_winding(other)
    return Mesh(mesh.vertices, torch.from_numpy(np.array(other.faces, dtype=np.int64)))


# -- Points against a mesh: how often the surface winds around them, and how far it is ---------------------------------
#
# The triangles are put into a balanced binary tree. All points go down together: at each level the pairs of a point
# and a
# node that still matter are one batch of tensors.


LEAF = 4
"""Largest number of triangles in a leaf."""

FAR = 2.0
"""Distance, in radii, beyond which a node enters the winding number by its dipole. The sum is then off by some
hundredths, and only its being above one half matters; near the surface the triangles themselves are used."""

POINTS_AT_ONCE = 8192


@dataclass(frozen=True)
class _Level:
    """The nodes at one depth of the tree: ``[nodes, ...]``.

    Attributes:
        centre: centre of the triangles' area.
        radius: radius of the ball around it that holds the triangles.
        dipole: the sum of the area vectors.
        normal: its direction.
        height, breadth: height and breadth of the flat cylinder along the normal, around the centre, that holds the
            triangles.
    """

    centre: Tensor
    radius: Tensor
    dipole: Tensor
    normal: Tensor
    height: Tensor
    breadth: Tensor

    def away(self, points: Tensor, node: Tensor) -> Tensor:
        """A lower bound on the distance from points to the triangles of nodes, in pairs."""
        to = points - self.centre[node]
        up = (to * self.normal[node]).sum(1)
        aside = (to.square().sum(1) - up.square()).clamp_min(0).sqrt()
        return torch.hypot((up.abs() - self.height[node]).clamp_min(0), (aside - self.breadth[node]).clamp_min(0))


class MeshTree:
    """A tree of a mesh's triangles for queries by points ``[points, 3]`` in the mesh's precision.

    Args:
        mesh: with one face at least.
    """

    def __init__(self, mesh: Mesh):
        from scipy.spatial import cKDTree

        corners = mesh.corners
        count = len(corners)
        depth = max(0, math.ceil(math.log2(count / LEAF)))
        size = math.ceil(count / 2**depth)
        order = torch.arange(2**depth * size)
        counts = order < count  # the rest repeats triangles, which must not count twice
        order = order % count
        centroids = corners.mean(1)
        area = mesh.crosses / 2
        levels = []
        table, mask = order[None], counts[None]
        for level in range(depth + 1):
            levels.append(_level(corners, centroids, area, table, mask))
            if level == depth:
                break
            inside = centroids[table]
            axis = (inside.amax(1) - inside.amin(1)).argmax(1)
            keys = inside.gather(2, axis[:, None, None].expand(-1, table.shape[1], 1)).squeeze(2)
            by_key = keys.argsort(dim=1)
            half = table.shape[1] // 2
            table = table.gather(1, by_key).reshape(-1, half)
            mask = mask.gather(1, by_key).reshape(-1, half)
        self._centroids = cKDTree(centroids.numpy())
        self._levels = levels
        self._leaves = table
        self._counted = mask
        self._corners = corners

    def winding(self, points: Tensor) -> Tensor:
        """The generalized winding number (Jacobson et al. 2013, *Robust inside-outside segmentation*), ``[points]``.

        One inside a closed surface and zero outside; where the surface has holes it goes over smoothly. Far nodes
        enter by their dipoles (Barill et al. 2018, *Fast winding numbers for soups and clouds*, of first order).
        """
        return torch.cat([self._winding(part) for part in points.split(POINTS_AT_ONCE)])

    def closest(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The nearest point of the surface: its distance ``[points]``, itself ``[points, 3]``, and its face."""
        parts = [self._closest(part) for part in points.split(POINTS_AT_ONCE)]
        distance, nearest, face = (torch.cat(columns) for columns in zip(*parts, strict=True))
        return distance, nearest, face

    def signed_distance(self, points: Tensor) -> Tensor:
        """Negative inside, ``[points]``."""
        distance, _, _ = self.closest(points)
        return torch.where(self.winding(points) > 0.5, -distance, distance)

    def _winding(self, points: Tensor) -> Tensor:
        total = points.new_zeros(len(points))
        who = torch.arange(len(points))
        node = torch.zeros_like(who)
        for level, at in enumerate(self._levels):
            away = at.centre[node] - points[who]
            distance = away.norm(dim=1)
            far = distance > FAR * at.radius[node]
            one, other = who[far], node[far]
            total.index_add_(0, one, (at.dipole[other] * away[far]).sum(1) / distance[far] ** 3)
            who, node = who[~far], node[~far]
            if level + 1 < len(self._levels):
                who, node = _children(who, node)
        corners = self._corners[self._leaves[node]]
        angles = solid_angles(corners - points[who][:, None, None]) * self._counted[node]
        return total.index_add_(0, who, angles.sum(1)) / (4 * math.pi)

    def _closest(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # no further than the nearest centroid, and a little for rounding
        bound = points.new_tensor(self._centroids.query(points.numpy())[0]) * (1 + 1e-4) + 1e-12
        who = torch.arange(len(points))
        node = torch.zeros_like(who)
        for level, at in enumerate(self._levels):
            near = at.away(points[who], node) <= bound[who]
            who, node = who[near], node[near]
            if level + 1 < len(self._levels):
                who, node = _children(who, node)
        faces = self._leaves[node]
        to = nearest_on_triangles(points[who][:, None], self._corners[faces])
        square, place = (to - points[who][:, None]).square().sum(-1).min(1)
        least = points.new_full((len(points),), math.inf).scatter_reduce(0, who, square, "amin")
        winner = torch.full((len(points),), -1)
        hits = (square == least[who]).nonzero().squeeze(1)
        winner[who[hits]] = hits
        face = faces[winner, place[winner]]
        return least.sqrt(), to[winner, place[winner]], face


def _children(who: Tensor, node: Tensor) -> tuple[Tensor, Tensor]:
    return who.repeat_interleave(2), (2 * node).repeat_interleave(2) + torch.arange(2).repeat(len(node))


def _level(corners: Tensor, centroids: Tensor, area: Tensor, table: Tensor, mask: Tensor) -> _Level:
    size = area[table].norm(dim=-1, keepdim=True) + 1e-300
    centre = (centroids[table] * size).sum(1) / size.sum(1)
    to = corners[table] - centre[:, None, None]
    square = to.square().sum(-1)
    dipole = (area[table] * mask[:, :, None]).sum(1)
    normal = torch.nn.functional.normalize(dipole, dim=1, eps=1e-300)
    up = (to * normal[:, None, None]).sum(-1)
    aside = (square - up.square()).clamp_min(0)
    radius, height, breadth = square.amax((1, 2)).sqrt(), up.abs().amax((1, 2)), aside.amax((1, 2)).sqrt()
    return _Level(centre, radius, dipole, normal, height, breadth)


def solid_angles(corners: Tensor) -> Tensor:
    """The signed solid angle of triangles as seen from the origin, ``[..., 3, 3]`` to ``[...]``: positive where the
    triangle's back is seen (van Oosterom and Strackee 1983)."""
    a, b, c = corners.unbind(-2)
    la, lb, lc = (side.norm(dim=-1) for side in (a, b, c))
    volume = (a * torch.linalg.cross(b, c)).sum(-1)
    rest = la * lb * lc + (a * b).sum(-1) * lc + (b * c).sum(-1) * la + (c * a).sum(-1) * lb
    return 2 * torch.atan2(volume, rest)


def nearest_on_triangles(points: Tensor, corners: Tensor) -> Tensor:
    """The nearest points ``[..., 3]`` of triangles ``[..., 3, 3]`` to points that broadcast with them."""
    a, b, c = corners.unbind(-2)
    best = a + 0 * points
    least = (best - points).square().sum(-1, keepdim=True)
    for start, end in ((a, b), (b, c), (c, a)):
        side = end - start
        share = ((points - start) * side).sum(-1, keepdim=True) / side.square().sum(-1, keepdim=True).clamp_min(1e-300)
        on = start + share.clamp(0, 1) * side
        square = (on - points).square().sum(-1, keepdim=True)
        best = torch.where(square < least, on, best)
        least = torch.minimum(square, least)
    normal = torch.linalg.cross(b - a, c - a)
    length = normal.square().sum(-1, keepdim=True)
    above = ((points - a) * normal).sum(-1, keepdim=True) / length.clamp_min(1e-300)
    foot = points - above * normal
    inside = length > 0
    for start, end in ((a, b), (b, c), (c, a)):
        inside = inside & ((torch.linalg.cross(end - start, foot - start) * normal).sum(-1, keepdim=True) >= 0)
    return torch.where(inside, foot, best)


# -- Mesh files: OBJ read here, the others by trimesh; written here ----------------------------------------------------


KINDS = (".obj", ".ply", ".stl", ".off")
HEADER_LINES = 1000
BYTES_A_FACE = 400
"""Bytes per face, more than any of the formats needs."""


def read_file(path: Path, most_faces: int) -> Mesh:
    """Read the triangles of a file; polygons are triangulated, and the parts of a scene joined.

    Raises:
        UserError: if it cannot be read, is no such file, holds no faces, or more than ``most_faces``.
    """
    if path.is_dir():
        raise UserError(f"--file {path} is a folder; give a mesh, such as bunny.ply")
    if not path.is_file():
        raise UserError(f"--file {path} does not exist")
    if path.suffix.lower() not in KINDS:
        raise UserError(f"{path.name} is not a mesh file by its name; give one of {', '.join(KINDS)}")
    size = path.stat().st_size
    if size > BYTES_A_FACE * most_faces:
        raise UserError(
            f"{path.name} has {size / 2**20:.0f} MB, and at most {most_faces} faces are read; make it coarser, or "
            "allow more: --most-faces"
        )
    if path.suffix.lower() == ".obj":
        mesh = _read_obj(path, most_faces)
    else:
        _check_counts(path)
        mesh = _by_trimesh(path)
    if len(mesh.faces) == 0:
        raise UserError(f"{path.name} holds no faces; give a surface of triangles, not a cloud of points")
    if int(mesh.faces.min()) < 0 or int(mesh.faces.max()) >= len(mesh.vertices):
        raise UserError(f"{path.name} has a face with a vertex that is not there: it is damaged, or cut short")
    if len(mesh.faces) > most_faces:
        raise UserError(
            f"{path.name} has {len(mesh.faces)} faces; make it coarser, or allow more: --most-faces {len(mesh.faces)}"
        )
    return mesh


def _by_trimesh(path: Path) -> Mesh:
    try:
        import trimesh
    except ImportError:
        raise UserError(
            "trimesh, which reads meshes, is not installed: pip install 'torchimplicit[shapes]'; or take a shape that "
            "is made here: --shape knot"
        ) from None
    try:
        loaded: Any = trimesh.load(path, force="mesh", process=False, skip_materials=True)
        vertices = np.array(loaded.vertices, dtype=np.float64).reshape(-1, 3)
        faces = np.array(getattr(loaded, "faces", ()), dtype=np.int64).reshape(-1, 3)
    except Exception as error:  # whatever a parser may meet
        raise UserError(f"{path.name} cannot be read as a mesh ({error or type(error).__name__})") from None
    return Mesh(torch.from_numpy(vertices), torch.from_numpy(faces))


def _read_obj(path: Path, most_faces: int) -> Mesh:
    """Read vertices and faces of Wavefront OBJ; other content of such a file is ignored.

    It is read here because trimesh takes the index 0, which there is not, for that of the last vertex.
    """
    vertices: list[tuple[float, float, float]] = []
    faces: list[tuple[int, int, int]] = []
    furthest, furthest_line = 0, 0
    for number, words in _obj_lines(path):
        try:
            if words[0] == "v":
                x, y, z = map(_number, words[1:4])
                vertices.append((x, y, z))
            elif words[0] == "f":
                named = [_corner(word, len(vertices)) for word in words[1:]]
                if max(named, default=0) > furthest:
                    furthest, furthest_line = max(named), number
                faces += [(named[0], b, c) for b, c in pairwise(named[1:])]
        except ValueError as error:
            reason = str(error) if words[0] == "f" else "a vertex is three numbers"
            raise UserError(f"{path.name}, line {number}: '{' '.join(words)[:60]}': {reason}") from None
        if len(faces) > most_faces or len(vertices) > 3 * most_faces:
            raise UserError(
                f"{path.name} has more than {most_faces} faces, or three times as many vertices; make it coarser, or "
                "allow more: --most-faces"
            )
    if furthest >= max(1, len(vertices)):
        raise UserError(
            f"{path.name}, line {furthest_line}: a face names vertex {furthest + 1}, and there are {len(vertices)}"
        )
    return Mesh(
        torch.tensor(vertices, dtype=torch.float64).reshape(-1, 3),
        torch.tensor(faces, dtype=torch.int64).reshape(-1, 3),
    )


def _obj_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The words of the nonempty lines, with line numbers; a trailing backslash continues a line."""
    before = ""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            text = before + line.partition("#")[0].rstrip()
            before = text[:-1] + " " if text.endswith("\\") else ""
            if not before and (words := text.split()):
                yield number, words


def _number(word: str) -> float:
    if not word.isascii() or "_" in word:
        raise ValueError
    return float(word)


def _corner(word: str, known: int) -> int:
    """The vertex index, counted from 0. In the file it counts from 1, or backwards from the last vertex so far."""
    index = word.partition("/")[0]
    if not re.fullmatch(r"[+-]?[0-9]{1,15}", index, re.ASCII):
        raise ValueError("a corner of a face is the number of a vertex")
    value = int(index)
    if value == 0:
        raise ValueError("vertices are counted from 1, and there is none of number 0")
    if value < -known:
        raise ValueError(f"there are {known} vertices before this line, and it goes {-value} back")
    return value - 1 if value > 0 else known + value


def _check_counts(path: Path) -> None:
    """Check that a text file has as many lines as its header promises, as trimesh takes what there is; for binary files
    it checks the length itself."""
    if path.suffix.lower() not in (".ply", ".off"):
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = (words for line in file if (words := line.partition("#")[0].split()))
        promised: list[str] = []
        if path.suffix.lower() == ".ply":
            for words in islice(lines, HEADER_LINES):
                if words[0] == "format" and words[1:2] != ["ascii"]:
                    return
                if words[0] == "element":
                    promised.append(words[-1])
                if words[0] == "end_header":
                    break
        else:
            promised = next(lines, [])
            if promised and promised[0].upper().endswith("OFF"):
                promised = promised[1:] or next(lines, [])
            promised = promised[:2]
        counts = [int(word) for word in promised if re.fullmatch(r"[0-9]{1,100}", word, re.ASCII)]
        if len(counts) < max(2, len(promised)):
            raise UserError(f"{path.name} cannot be read: its header does not say how many vertices and faces it has")
        there = sum(1 for _ in lines)
    if there > sum(counts):
        raise UserError(
            f"{path.name} promises {sum(counts)} vertices and faces, and {there} lines follow: its header is wrong, or "
            "it holds more than one mesh"
        )
    if there < sum(counts):
        raise UserError(
            f"{path.name} promises {sum(counts)} vertices and faces, and {there} follow: it is cut short, or its "
            "header is wrong"
        )


def write_obj(mesh: Mesh, path: Path) -> None:
    """Write Wavefront OBJ as text, atomically."""
    lines = ["# torchimplicit"]
    lines += [f"v {x:.9g} {y:.9g} {z:.9g}" for x, y, z in mesh.vertices.tolist()]
    lines += [f"f {a} {b} {c}" for a, b, c in (mesh.faces + 1).tolist()]
    write_text(path, "\n".join(lines) + "\n")


def write_ply(mesh: Mesh, path: Path) -> None:
    """Write Stanford PLY (binary, little-endian), atomically."""
    head = (
        "ply\nformat binary_little_endian 1.0\ncomment torchimplicit\n"
        f"element vertex {len(mesh.vertices)}\nproperty float x\nproperty float y\nproperty float z\n"
        f"element face {len(mesh.faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    faces = np.empty(len(mesh.faces), dtype=[("count", "u1"), ("corners", "<i4", 3)])
    faces["count"] = 3
    faces["corners"] = mesh.faces.numpy()
    with replacing(path) as draft:
        draft.write_bytes(head.encode("ascii") + mesh.vertices.numpy().astype("<f4").tobytes() + faces.tobytes())


# -- Meshes made here, for where no file is given ----------------------------------------------------------------------


MadeName = Literal["knot", "gyroid"]
MADE: tuple[MadeName, ...] = get_args(MadeName)


def made(name: MadeName) -> Mesh:
    """A shape by its name; each is watertight."""
    return knot() if name == "knot" else gyroid()


def knot(turns: int = 2, windings: int = 3, around: int = 480, across: int = 32, thickness: float = 0.42) -> Mesh:
    """A tube around the torus knot that goes ``turns`` times around the axis and ``windings`` times through the hole.

    Args:
        turns, windings: turns and windings of the knot, without a common divisor.
        around, across: how many vertices along the tube and around it.
        thickness: the tube's radius, where the torus has radii of 2 and 1.
    """
    t = torch.arange(around, dtype=torch.float64) * (2 * math.pi / around)
    p, q = turns * t, windings * t
    radius = 2 + q.cos()
    centre = torch.stack([radius * p.cos(), radius * p.sin(), q.sin()], 1)
    slope = torch.stack(
        [
            -windings * q.sin() * p.cos() - turns * radius * p.sin(),
            -windings * q.sin() * p.sin() + turns * radius * p.cos(),
            windings * q.cos(),
        ],
        1,
    )
    along = torch.nn.functional.normalize(slope, dim=1)
    # the torus' own normal is a frame that closes after a turn, which a parallel one would not
    outward = torch.stack([q.cos() * p.cos(), q.cos() * p.sin(), q.sin()], 1)
    side = torch.linalg.cross(along, outward)
    angle = torch.arange(across, dtype=torch.float64) * (2 * math.pi / across)
    ring = angle.cos()[None, :, None] * outward[:, None] + angle.sin()[None, :, None] * side[:, None]
    vertices = (centre[:, None] + thickness * ring).reshape(-1, 3)
    i, j = torch.meshgrid(torch.arange(around), torch.arange(across), indexing="ij")
    a, b = i * across + j, i * across + (j + 1) % across
    c, d = (i + 1) % around * across + j, (i + 1) % around * across + (j + 1) % across
    faces = torch.stack([torch.stack([a, c, b], -1), torch.stack([b, c, d], -1)]).reshape(-1, 3)
    mesh = Mesh(vertices, faces)
    return mesh if mesh.volume > 0 else Mesh(vertices, faces.flip(1))


def gyroid(size: int = 64, cells: float = 1.25, wall: float = 0.45) -> Mesh:
    """A ball cut out of thick gyroid walls, by marching cubes, with many holes and thin parts.

    Args:
        size: size of the grid.
        cells: periods across a radius.
        wall: half the walls' thickness, in values of the gyroid function.
    """
    from skimage.measure import marching_cubes

    side = np.linspace(-1.1, 1.1, size)
    x, y, z = np.meshgrid(side, side, side, indexing="ij")
    k = 2 * math.pi * cells
    sheet = wall - np.abs(np.sin(k * x) * np.cos(k * y) + np.sin(k * y) * np.cos(k * z) + np.sin(k * z) * np.cos(k * x))
    ball = 1 - np.sqrt(x * x + y * y + z * z)
    vertices, faces, _, _ = marching_cubes(np.minimum(sheet / k, ball), 0.0)
    places = torch.from_numpy(vertices.astype(np.float64)) * (2.2 / (size - 1)) - 1.1
    mesh = Mesh(places, torch.from_numpy(faces.astype(np.int64)))
    return mesh if mesh.volume > 0 else Mesh(mesh.vertices, mesh.faces.flip(1))


# -- The surface that a field describes, by marching cubes, a few layers of the grid at a time -------------------------


BYTES_A_VALUE = 64
"""A generous estimate of the bytes that marching cubes holds per value, including the value."""


def lattice(corner: Sequence[float], longest: int) -> tuple[tuple[int, ...], list[Tensor]]:
    """A grid of nearly cubic cells from corner to corner: its sizes, and the coordinates along each side.

    Args:
        corner: corner of the domain, ``-corner`` to ``corner``.
        longest: points along the longest side.
    """
    sizes = tuple(max(2, round(longest * side / max(corner))) for side in corner)
    lines = [torch.linspace(-side, side, n, dtype=torch.float64) for side, n in zip(corner, sizes, strict=True)]
    return sizes, lines


def extracted(
    height: Callable[[Tensor], Tensor], corner: Sequence[float], longest: int, memory_mb: int, at_once: int = 65536
) -> Mesh | None:
    """The surface ``height = 0``, closed at the border of the domain; ``None`` if there is none.

    Args:
        height: positive inside; of coordinates ``[points, 3]``, on the CPU; gives ``[points]``.
        corner: corner of the domain.
        longest: grid points along the longest side.
        memory_mb: what the layers that are in work may take.
        at_once: points of one evaluation.
    """
    from skimage.measure import marching_cubes

    sizes, lines = lattice(corner, longest)
    steps = np.array([2 * side / (n - 1) for side, n in zip(corner, sizes, strict=True)])
    layer = sizes[1] * sizes[2]
    layers = max(1, memory_mb * 2**20 // (BYTES_A_VALUE * layer) - 1)
    plane = torch.cartesian_prod(lines[1], lines[2])
    last: Tensor | None = None
    vertices, faces, count = [], [], 0
    for start in range(0, sizes[0] - 1, layers):
        stop = min(start + layers, sizes[0] - 1)
        planes = range(start if last is None else start + 1, stop + 1)
        values = torch.empty(stop - start + 1, sizes[1], sizes[2])
        if last is not None:
            values[0] = last
        for i in planes:
            x = torch.cat([lines[0][i].expand(layer, 1), plane], 1).float()
            values[i - start] = torch.cat([height(part) for part in x.split(at_once)]).reshape(sizes[1:])
            _close(values[i - start], i in (0, sizes[0] - 1))
        last = values[-1].clone()
        if float(values.max()) <= 0 or float(values.min()) >= 0:
            continue
        positions, corners, _, _ = marching_cubes(values.numpy(), 0.0, allow_degenerate=False)
        vertices.append(positions.astype(np.float64) + np.array([start, 0, 0]))
        faces.append(corners.astype(np.int64) + count)
        count += len(positions)
    if not vertices:
        return None
    mesh = _joined(np.concatenate(vertices), np.concatenate(faces))
    places = mesh.vertices * torch.from_numpy(steps) - torch.tensor(list(corner), dtype=torch.float64)
    mesh = Mesh(places, mesh.faces)
    return mesh if mesh.volume >= 0 else Mesh(mesh.vertices, mesh.faces.flip(1))


def _close(values: Tensor, whole: bool) -> None:
    """Mark a layer as outside along the domain's border, so that the surface is closed there by a wall."""
    border = torch.ones_like(values, dtype=torch.bool)
    if not whole:
        border[1:-1, 1:-1] = False
    values[border] = values[border].clamp_max(-1e-6)


def _joined(vertices: np.ndarray, faces: np.ndarray) -> Mesh:
    """Join slabs at the vertices of their common layer, which both computed from the same values."""
    kept, place = np.unique(vertices, axis=0, return_inverse=True)
    corners = place.reshape(-1)[faces]
    whole = (corners[:, 0] != corners[:, 1]) & (corners[:, 1] != corners[:, 2]) & (corners[:, 2] != corners[:, 0])
    return Mesh(torch.from_numpy(kept), torch.from_numpy(corners[whole]))


# -- Shaded pictures of meshes: uint8 ``[height, width, 3]`` -----------------------------------------------------------


CLAY = (0.80, 0.83, 0.88)
LIGHT = (-0.5, 0.6, 0.75)
"""Direction of the light: right, up, toward the viewer."""


def view(turn: float = 35.0, tilt: float = 20.0) -> Tensor:
    """Rows right, up and toward the viewer; angles in degrees. The y axis points up, as in most mesh files."""
    a, b = math.radians(turn), math.radians(tilt)
    right = torch.tensor([math.cos(a), 0.0, -math.sin(a)], dtype=torch.float64)
    toward = torch.tensor([math.sin(a) * math.cos(b), math.sin(b), math.cos(a) * math.cos(b)], dtype=torch.float64)
    return torch.stack([right, torch.linalg.cross(toward, right), toward])


def drawn(mesh: Mesh | None, size: int, eye: Tensor, colours: Tensor | None = None, reach: float = 1.25) -> Tensor:
    """Render a mesh in the field's coordinates, seen from far away.

    Args:
        mesh: ``None`` for an empty picture.
        size: pixels of a side.
        eye: see :func:`view`.
        colours: ``[vertices, 3]``, from 0 to 1.
        reach: the picture shows so far from the middle.
    """
    fine = 2 * size  # reduced to a half, for smooth edges
    picture = torch.ones(fine * fine, 3, dtype=torch.float64)
    if mesh is not None:
        pixel, face, weights = _seen(mesh, fine, eye, reach)
        corners = mesh.faces[face]
        normal = normalize((mesh.vertex_normals()[corners] * weights).sum(1), dim=1) @ eye.T
        light = normalize(torch.tensor(LIGHT, dtype=torch.float64), dim=0)
        colour = torch.tensor(CLAY, dtype=torch.float64) if colours is None else (colours[corners] * weights).sum(1)
        picture[pixel] = (colour * (0.28 + 0.72 * (normal @ light).clamp_min(0))[:, None]).clamp(0, 1)
    picture = picture.reshape(size, 2, size, 2, 3).mean((1, 3))
    return (255 * picture).round().to(torch.uint8)


def _seen(mesh: Mesh, fine: int, eye: Tensor, reach: float) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels that show the mesh, which face each shows, and the barycentric weights ``[pixels, 3, 1]`` there."""
    across, up, depth = (mesh.vertices @ eye.T).unbind(1)
    places = torch.stack([(across / reach + 1) / 2 * fine - 0.5, (1 - up / reach) / 2 * fine - 0.5], 1)
    flat = places[mesh.faces]
    a, b, c = flat.unbind(1)
    (ux, uy), (vx, vy) = (b - a).unbind(1), (c - a).unbind(1)
    turn = ux * vy - uy * vx
    faces = (turn < 0).nonzero().squeeze(1)  # rows go downward: those turned to the eye
    low = flat[faces].amin(1).ceil().clamp(0, fine).long()
    high = flat[faces].amax(1).floor().clamp(-1, fine - 1).long()
    width, height = (high - low + 1).clamp_min(0).unbind(1)
    count = width * height
    which = torch.arange(len(faces)).repeat_interleave(count)
    place = torch.arange(len(which)) - (count.cumsum(0) - count)[which]
    x = low[which, 0] + place % width[which]
    y = low[which, 1] + place // width[which]
    face = faces[which]
    px, py = x - a[face, 0], y - a[face, 1]
    second = (px * vy[face] - py * vx[face]) / turn[face]
    third = (py * ux[face] - px * uy[face]) / turn[face]
    weights = torch.stack([1 - second - third, second, third], 1)
    within = (weights >= -1e-9).all(1)
    face, weights, pixel = face[within], weights[within], (y * fine + x)[within]
    near = (depth[mesh.faces[face]] * weights).sum(1)
    nearest = torch.full((fine * fine,), -math.inf, dtype=torch.float64).scatter_reduce(0, pixel, near, "amax")
    front = near == nearest[pixel]
    return pixel[front], face[front], weights[front][:, :, None]


def heat(values: Tensor, most: float) -> Tensor:
    """Values from 0 to ``most`` as colours ``[..., 3]`` from 0 to 1: dark is none."""
    import matplotlib

    return torch.from_numpy(matplotlib.colormaps["viridis"](np.clip(values.numpy() / most, 0, 1))[..., :3])
