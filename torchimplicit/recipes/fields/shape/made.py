"""Meshes made here, for where no file is given."""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch

from torchimplicit.recipes.fields.shape.mesh import Mesh

MadeName = Literal["knot", "gyroid"]
MADE: tuple[MadeName, ...] = get_args(MadeName)


def made(name: MadeName) -> Mesh:
    """A shape by its name; each is watertight."""
    return knot() if name == "knot" else gyroid()


def knot(turns: int = 2, windings: int = 3, around: int = 480, across: int = 32, thickness: float = 0.42) -> Mesh:
    """A tube around the torus knot that goes ``turns`` times around the axis and ``windings`` times through the hole.

    Args:
        turns, windings: of the knot, without a common divisor.
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
    """A ball cut out of thick gyroid walls, by marching cubes: many holes, and thin parts.

    Args:
        size: of the grid.
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
