"""Points on a surface with their normals, without faces."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.task import Metric

LEAST = 100
"""Smallest number of points in a cloud."""


@dataclass(frozen=True)
class Cloud:
    """Points ``[points, 3]`` and outward unit normals of the same shape, float64."""

    points: Tensor
    normals: Tensor


def read_cloud(path: Path, most: int) -> Cloud | None:
    """The cloud of an ``.xyz`` file (six numbers a line: a point and its normal) or of a ``.ply`` file without faces;
    ``None`` for any other file.

    Raises:
        UserError: it cannot be read, has more than ``most`` points or too few, or has no normals.
    """
    kind = path.suffix.lower()
    if not path.is_file() or kind not in (".xyz", ".ply"):
        return None
    cloud = _read_xyz(path, most) if kind == ".xyz" else _read_ply(path, most)
    if cloud is None:
        return None
    if cloud.shape[1] < 6:
        raise UserError(
            f"{path.name} has points without normals, and which side is out cannot be told from points alone: estimate "
            "and orient them first (x y z nx ny nz a line)"
        )
    cloud = cloud[np.isfinite(cloud).all(1) & (np.abs(cloud[:, 3:6]).sum(1) > 0)]
    if len(cloud) < LEAST:
        raise UserError(f"{path.name} has {len(cloud)} points with normals; {LEAST} at least are needed")
    values = torch.from_numpy(cloud)
    return Cloud(values[:, :3].contiguous(), functional.normalize(values[:, 3:6], dim=1))


def _read_xyz(path: Path, most: int) -> Any:
    rows: list[list[float]] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            words = line.partition("#")[0].replace(",", " ").split()
            if not words or (number == 1 and len(words) == 1):  # some files begin with their count
                continue
            try:
                rows.append([float(word) for word in words[:6]])
            except ValueError:
                raise UserError(f"{path.name}, line {number}: {line.strip()[:40]!r} are no numbers") from None
            if len(rows[-1]) != len(rows[0]) or len(rows[-1]) < 3:
                raise UserError(f"{path.name}, line {number} has {len(rows[-1])} numbers, and the first {len(rows[0])}")
            if len(rows) > most:
                raise UserError(
                    f"{path.name} has more than {most} points; make it sparser, or allow more: --most-faces"
                )
    return np.array(rows, dtype=np.float64).reshape(len(rows), -1) if rows else np.zeros((0, 6))


_TYPES = {
    **dict.fromkeys(("char", "int8"), "i1"),
    **dict.fromkeys(("uchar", "uint8"), "u1"),
    **dict.fromkeys(("short", "int16"), "i2"),
    **dict.fromkeys(("ushort", "uint16"), "u2"),
    **dict.fromkeys(("int", "int32"), "i4"),
    **dict.fromkeys(("uint", "uint32"), "u4"),
    **dict.fromkeys(("float", "float32"), "f4"),
    **dict.fromkeys(("double", "float64"), "f8"),
}
WANTED = ("x", "y", "z", "nx", "ny", "nz")


def _read_ply(path: Path, most: int) -> Any:
    """The required columns of the vertices; ``None`` if there are faces."""
    with path.open("rb") as file:
        kind, count, faces, columns, element = "", 0, 0, [], ""
        for _ in range(1000):
            words = file.readline(1000).decode("ascii", "replace").split()
            if not words or words[0] in ("ply", "comment", "obj_info"):
                continue
            if words[0] == "format":
                kind = words[1] if len(words) > 1 else ""
            elif words[0] == "element" and len(words) == 3 and words[2].isdigit():
                element = words[1]
                count, faces = (int(words[2]), faces) if element == "vertex" else (count, faces + int(words[2]))
            elif words[0] == "property" and element == "vertex" and len(words) == 3 and words[1] in _TYPES:
                columns.append((words[2], _TYPES[words[1]]))
            elif words[0] == "end_header":
                break
        else:
            return None  # no header: the reader of meshes says so
        if faces or not count:
            return None
        if count > most:
            raise UserError(f"{path.name} has {count} points; make it sparser, or allow more: --most-faces {count}")
        there = [name for name in WANTED if name in dict(columns)]
        if kind == "ascii":
            rows = [file.readline(10000).split()[: len(columns)] for _ in range(count)]
            try:
                text = np.array(rows, dtype=np.float64).reshape(count, len(columns))
            except ValueError:
                raise UserError(
                    f"{path.name} cannot be read: {count} points are promised; it may be cut short"
                ) from None
            names = [name for name, _ in columns]
            return np.stack([text[:, names.index(name)] for name in there], 1) if there else np.zeros((count, 0))
        order = {"binary_little_endian": "<", "binary_big_endian": ">"}.get(kind)
        if order is None:
            raise UserError(f"{path.name} has the format {kind!r}, which no PLY file has")
        layout = np.dtype([(name, order + code) for name, code in columns])
        content = file.read(layout.itemsize * count)
        if len(content) < layout.itemsize * count:
            raise UserError(f"{path.name} promises {count} points, and is cut short")
        table = np.frombuffer(content, layout, count)
        return np.stack([table[name].astype(np.float64) for name in there], 1) if there else np.zeros((count, 0))


@final
@dataclass(frozen=True)
class OnSurface:
    """Mean absolute value of the field at held-out surface points, as a share of the longest side; for a distance
    field, their distance to its surface."""

    longest: float

    @property
    def metric(self) -> Metric:
        return Metric("distance", "", "min")

    def sums(self, values: Tensor, y: Tensor) -> Tensor:
        """The sum of absolute values, and their number."""
        size = values[:, 0].abs().double() / self.longest
        return torch.stack([size.sum(), size.new_tensor(float(len(size)))])

    def figures(self, sums: list[float]) -> dict[str, float]:
        """The mean, also as ``loss``."""
        mean = sums[0] / max(sums[1], 1.0)
        return {"distance": mean, "loss": mean}
