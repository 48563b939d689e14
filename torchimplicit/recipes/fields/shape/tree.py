"""Points against a mesh: how often the surface winds around them, and how far it is.

The triangles are put into a balanced binary tree. All points go down together: at each level the pairs of a point and a
node that still matter are one batch of tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.spatial import cKDTree
from torch import Tensor

from torchimplicit.recipes.fields.shape.mesh import Mesh

LEAF = 4
"""Triangles in a leaf, at most."""

FAR = 2.0
"""A node that is so many of its radii away enters the winding number by its dipole. The sum is off by some hundredths
then, where one half decides; beside the surface its triangles themselves are taken."""

POINTS_AT_ONCE = 8192


@dataclass(frozen=True)
class _Level:
    """The nodes of one depth: ``[nodes, ...]``.

    Attributes:
        centre: of the triangles' area.
        radius: of the ball around it that holds the triangles.
        dipole: the sum of the area vectors.
        normal: its direction.
        height, breadth: of the flat cylinder along the normal, around the centre, that holds the triangles.
    """

    centre: Tensor
    radius: Tensor
    dipole: Tensor
    normal: Tensor
    height: Tensor
    breadth: Tensor

    def away(self, points: Tensor, node: Tensor) -> Tensor:
        """No more than the distance from points to the triangles of nodes, in pairs."""
        to = points - self.centre[node]
        up = (to * self.normal[node]).sum(1)
        aside = (to.square().sum(1) - up.square()).clamp_min(0).sqrt()
        return torch.hypot((up.abs() - self.height[node]).clamp_min(0), (aside - self.breadth[node]).clamp_min(0))


class MeshTree:
    """The triangles of a mesh for queries by points, ``[points, 3]`` in the mesh's precision.

    Args:
        mesh: with one face at least.
    """

    def __init__(self, mesh: Mesh):
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
        distance, nearest, face = (torch.cat(found) for found in zip(*parts, strict=True))
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
