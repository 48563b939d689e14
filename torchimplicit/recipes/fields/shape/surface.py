"""The surface that a field describes, by marching cubes, a few layers of the grid at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from torchimplicit.recipes.fields.shape.mesh import Mesh

BYTES_A_VALUE = 64
"""What marching cubes holds for a value, with the value, generously."""


def lattice(corner: Sequence[float], longest: int) -> tuple[tuple[int, ...], list[Tensor]]:
    """A grid of nearly cubic cells from corner to corner: its sizes, and the coordinates along each side.

    Args:
        corner: of the domain, ``-corner`` to ``corner``.
        longest: points along the longest side.
    """
    sizes = tuple(max(2, round(longest * side / max(corner))) for side in corner)
    lines = [torch.linspace(-side, side, n, dtype=torch.float64) for side, n in zip(corner, sizes, strict=True)]
    return sizes, lines


def extracted(
    height: Callable[[Tensor], Tensor], corner: Sequence[float], longest: int, memory_mb: int, at_once: int = 65536
) -> Mesh | None:
    """Where ``height`` is zero, closed at the border of the domain; ``None`` if it is nowhere.

    Args:
        height: positive inside; of coordinates ``[points, 3]``, on the CPU; gives ``[points]``.
        corner: of the domain.
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
        own = range(start if last is None else start + 1, stop + 1)
        values = torch.empty(stop - start + 1, sizes[1], sizes[2])
        if last is not None:
            values[0] = last
        for i in own:
            x = torch.cat([lines[0][i].expand(layer, 1), plane], 1).float()
            values[i - start] = torch.cat([height(part) for part in x.split(at_once)]).reshape(sizes[1:])
            _close(values[i - start], i in (0, sizes[0] - 1))
        last = values[-1].clone()
        if float(values.max()) <= 0 or float(values.min()) >= 0:
            continue
        found, corners, _, _ = marching_cubes(values.numpy(), 0.0, allow_degenerate=False)
        vertices.append(found.astype(np.float64) + np.array([start, 0, 0]))
        faces.append(corners.astype(np.int64) + count)
        count += len(found)
    if not vertices:
        return None
    mesh = _joined(np.concatenate(vertices), np.concatenate(faces))
    places = mesh.vertices * torch.from_numpy(steps) - torch.tensor(list(corner), dtype=torch.float64)
    mesh = Mesh(places, mesh.faces)
    return mesh if mesh.volume >= 0 else Mesh(mesh.vertices, mesh.faces.flip(1))


def _close(values: Tensor, whole: bool) -> None:
    """Leave a layer outside along the domain's border, so that the surface ends there in a wall."""
    border = torch.ones_like(values, dtype=torch.bool)
    if not whole:
        border[1:-1, 1:-1] = False
    values[border] = values[border].clamp_max(-1e-6)


def _joined(vertices: np.ndarray, faces: np.ndarray) -> Mesh:
    """Slabs share the vertices of the layer between them, which both have made from the same values."""
    kept, place = np.unique(vertices, axis=0, return_inverse=True)
    corners = place.reshape(-1)[faces]
    whole = (corners[:, 0] != corners[:, 1]) & (corners[:, 1] != corners[:, 2]) & (corners[:, 2] != corners[:, 0])
    return Mesh(torch.from_numpy(kept), torch.from_numpy(corners[whole]))
