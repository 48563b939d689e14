"""Mesh files: OBJ read here, the others by trimesh; written here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchimplicit.recipes.fields.shape.mesh import Mesh
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import replacing, write_text

KINDS = (".obj", ".ply", ".stl", ".off")
HEADER_LINES = 1000
BYTES_A_FACE = 400
"""More than any of the formats needs."""


def read_file(path: Path, most_faces: int) -> Mesh:
    """The triangles of a file, as they are there; polygons are cut into triangles, and the parts of a scene joined.

    Raises:
        UserError: if it cannot be read, is no such file, holds no faces, or more than ``most_faces``.
    """
    if path.is_dir():
        raise UserError(f"--file {path} is a folder; give a mesh, such as bunny.ply")
    if not path.is_file():
        raise UserError(f"--file {path} does not exist")
    if path.suffix.lower() not in KINDS:
        raise UserError(f"{path.name} is no mesh file by its name; give one of {', '.join(KINDS)}")
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
        found: Any = trimesh.load(path, force="mesh", process=False, skip_materials=True)
        vertices = np.array(found.vertices, dtype=np.float64).reshape(-1, 3)
        faces = np.array(getattr(found, "faces", ()), dtype=np.int64).reshape(-1, 3)
    except Exception as error:  # whatever a parser may meet
        raise UserError(f"{path.name} cannot be read as a mesh ({error or type(error).__name__})") from None
    return Mesh(torch.from_numpy(vertices), torch.from_numpy(faces))


def _read_obj(path: Path, most_faces: int) -> Mesh:
    """Vertices and faces of Wavefront OBJ; what else such a file may hold is no part of the surface.

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
    """The words of the lines that are not empty, with their numbers; one that ends in a backslash goes on."""
    before = ""
    with path.open(encoding="utf-8", errors="replace") as file:
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
    """Which vertex, counted from 0. In the file they are counted from 1, or backwards from the last one so far."""
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
    """As many lines must follow as a text's header promises, for trimesh takes what there is; of binary files it
    compares the length itself."""
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
    if there < sum(counts):
        raise UserError(
            f"{path.name} promises {sum(counts)} vertices and faces, and {there} follow: it is cut short, or its "
            "header is wrong"
        )


def write_obj(mesh: Mesh, path: Path) -> None:
    """Wavefront OBJ, as text, in one move."""
    lines = ["# torchimplicit"]
    lines += [f"v {x:.9g} {y:.9g} {z:.9g}" for x, y, z in mesh.vertices.tolist()]
    lines += [f"f {a} {b} {c}" for a, b, c in (mesh.faces + 1).tolist()]
    write_text(path, "\n".join(lines) + "\n")


def write_ply(mesh: Mesh, path: Path) -> None:
    """Stanford PLY, binary, little-endian, in one move."""
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
