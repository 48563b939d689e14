"""Shaded pictures of meshes: uint8 ``[height, width, 3]``."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from torchimplicit.recipes.fields.shape.mesh import Mesh

CLAY = (0.80, 0.83, 0.88)
LIGHT = (-0.5, 0.6, 0.75)
"""Where it comes from: right, up, toward the eye."""


def view(turn: float = 35.0, tilt: float = 20.0) -> Tensor:
    """Right, up and toward the eye, as rows; angles in degrees. The y axis points up, as in most mesh files."""
    a, b = math.radians(turn), math.radians(tilt)
    right = torch.tensor([math.cos(a), 0.0, -math.sin(a)], dtype=torch.float64)
    toward = torch.tensor([math.sin(a) * math.cos(b), math.sin(b), math.cos(a) * math.cos(b)], dtype=torch.float64)
    return torch.stack([right, torch.linalg.cross(toward, right), toward])


def drawn(mesh: Mesh | None, size: int, eye: Tensor, colours: Tensor | None = None, reach: float = 1.25) -> Tensor:
    """A mesh in the field's coordinates, seen from far away.

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
        own = torch.tensor(CLAY, dtype=torch.float64) if colours is None else (colours[corners] * weights).sum(1)
        picture[pixel] = (own * (0.28 + 0.72 * (normal @ light).clamp_min(0))[:, None]).clamp(0, 1)
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
    return torch.from_numpy(matplotlib.colormaps["viridis"](np.clip(values.numpy() / most, 0, 1))[..., :3])
