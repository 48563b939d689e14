"""Mesh files: read by trimesh, written here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchimplicit.recipes.errors import UserError
from torchimplicit.recipes.fields.shape.mesh import Mesh
from torchimplicit.recipes.files import replacing, write_text

KINDS = (".obj", ".ply", ".stl", ".off")
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
    if len(faces) == 0:
        raise UserError(f"{path.name} holds no faces; give a surface of triangles, not a cloud of points")
    if len(faces) > most_faces:
        raise UserError(
            f"{path.name} has {len(faces)} faces; make it coarser, or allow more: --most-faces {len(faces)}"
        )
    return Mesh(torch.from_numpy(vertices), torch.from_numpy(faces))


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
