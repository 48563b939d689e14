"""Your own graph with a label for every node, from arrays or tables."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchimplicit.recipes.phantom.image_files import set_apart
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import no_larger

LARGEST_FILE = 1 << 31
"""Largest file accepted, in bytes."""

SAID = (
    "--data-dir must be an .npz file with x, edge_index and y, or a folder with nodes.csv (features and, last, the "
    "label) and edges.csv (source, target and perhaps weight, counted from 0)"
)


class NodeGraph(NamedTuple):
    """A graph with labelled nodes.

    Attributes:
        x: ``[nodes, features]`` (float32).
        edges: ``[2, edges]``, sources and targets.
        weights: ``[edges]`` (float32), or ``None`` for ones.
        y: ``[nodes]``, from 0 on.
        names: names of the labels.
        parts: indices of the nodes for training, validation and testing, or ``None`` where none are given.
    """

    x: Tensor
    edges: Tensor
    weights: Tensor | None
    y: Tensor
    names: tuple[str, ...]
    parts: tuple[Tensor, Tensor, Tensor] | None


def read(place: Path, undirected: bool = True) -> NodeGraph:
    """Read the graph.

    Args:
        place: an .npz file, or a folder of two tables; see :data:`SAID`.
        undirected: take every edge in both directions, once.

    Raises:
        UserError: it is neither, a part is missing, or parts contradict one another.
    """
    if place.is_dir():
        tables = _tables(place)
    elif place.suffix == ".npz" and place.is_file():
        tables = _arrays(place)
    else:
        raise UserError(f"{place} is {'no such file' if place.is_file() else 'not there'}: {SAID}")
    x, edges, y = tables["x"], tables["edges"], tables["y"]
    nodes = len(x)
    if len(y) != nodes:
        raise UserError(f"{place} has {len(y)} labels and {nodes} nodes")
    if not np.isfinite(x).all():
        raise UserError(f"{place}: the features hold NaN or infinity")
    if edges.size and (edges.min() < 0 or edges.max() >= nodes):
        raise UserError(
            f"{place} has edges between the nodes {edges.min()} to {edges.max()}, and there are nodes 0 to {nodes - 1}"
        )
    names, kinds = np.unique(y, return_inverse=True)
    if len(names) < 2:
        raise UserError(f"{place} has one label only: there is nothing to learn")
    ends, weights = _both_ways(edges, tables.get("weights")) if undirected else (edges, tables.get("weights"))
    if weights is not None and not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise UserError(f"{place}: the edges' weights must be finite and not negative")
    return NodeGraph(
        torch.from_numpy(np.asarray(x, dtype=np.float32)),
        torch.from_numpy(np.ascontiguousarray(ends, dtype=np.int64)),
        None if weights is None else torch.from_numpy(np.asarray(weights, dtype=np.float32)),
        torch.from_numpy(kinds.astype(np.int64)),
        tuple(map(str, names.tolist())),
        _parts(tables, nodes, place),
    )


def split(graph: NodeGraph, shares: tuple[float, float], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The nodes for training, validation and test: as given, or a stratified random split.

    Args:
        graph: the graph.
        shares: shares of the nodes, for training and for validation.
        seed: seed of the draw.
    """
    if graph.parts is not None:
        return graph.parts
    counts = [max(1, round(share * len(graph.y))) for share in shares]
    train, rest = set_apart(graph.y, counts[0], seed, "the graph")
    chosen, test = set_apart(graph.y[rest], min(counts[1], len(rest) - 1), seed, "the graph")
    return train, rest[chosen], rest[test]


def _both_ways(edges: NDArray[Any], weights: NDArray[Any] | None) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Every edge in both directions, once; if both exist already, the first one's weight is used."""
    both = np.concatenate([edges, edges[::-1]], axis=1)
    kept, first = np.unique(both, axis=1, return_index=True)
    return kept, None if weights is None else np.concatenate([weights, weights])[first]


# -- From an .npz file -------------------------------------------------------------------------------------------------


def _arrays(path: Path) -> dict[str, Any]:
    no_larger(path, LARGEST_FILE)
    try:
        with np.load(path, allow_pickle=False) as opened:
            arrays = {name: opened[name] for name in opened.files}
    except Exception as error:  # archives and headers fail in many ways
        raise UserError(f"{path} is no whole .npz file of numbers ({' '.join(str(error).split())})") from None

    def of(*names: str) -> NDArray[Any] | None:
        return next((arrays[name] for name in names if name in arrays), None)

    edges = of("edge_index", "edges", "edges_undirected", "edges_directed")
    y, x = of("y", "labels", "node_labels"), _features(arrays, of("x", "features", "node_features"))
    for what, array in (("x", x), ("edge_index", edges), ("y", y)):
        if array is None:
            raise UserError(f"{path} has no {what}; it holds {', '.join(arrays) or 'nothing'}. {SAID}")
    assert edges is not None
    assert y is not None
    if edges.ndim != 2 or 2 not in edges.shape or edges.dtype.kind not in "iu":
        raise UserError(f"{path}: the edges must be whole numbers [2, edges], and they are {edges.shape} {edges.dtype}")
    parts = {
        name: array
        for name in ("train", "val", "test")
        if (array := of(f"{name}_idx", f"{name}_mask", *(["valid_idx", "valid_mask"] if name == "val" else [])))
        is not None
    }
    return {
        "x": x,
        "edges": edges if len(edges) == 2 else edges.T,
        "weights": of("edge_weight", "edge_weights"),
        "y": y.reshape(-1),
        **parts,
    }


def _features(arrays: Mapping[str, NDArray[Any]], whole: NDArray[Any] | None) -> NDArray[Any] | None:
    """A dense matrix, or one in compressed rows: ``x_data``, ``x_indices``, ``x_indptr`` and ``x_shape``."""
    names = ("x_data", "x_indices", "x_indptr", "x_shape")
    if whole is not None or not all(name in arrays for name in names):
        return whole if whole is None or whole.ndim == 2 else whole.reshape(len(whole), -1)
    from scipy.sparse import csr_matrix

    values, indices, starts, shape = (arrays[name] for name in names)
    return np.asarray(csr_matrix((values, indices, starts), shape=tuple(shape)).todense())


def _parts(tables: Mapping[str, Any], nodes: int, place: Path) -> tuple[Tensor, Tensor, Tensor] | None:
    if not all(name in tables for name in ("train", "val", "test")):
        return None
    parts = []
    for name in ("train", "val", "test"):
        part = np.flatnonzero(tables[name]) if tables[name].dtype == bool else tables[name].astype(np.int64)
        if not len(part) or part.min() < 0 or part.max() >= nodes:
            raise UserError(f"{place}: its part '{name}' must name nodes from 0 to {nodes - 1}")
        parts.append(torch.from_numpy(part))
    if len(torch.unique(torch.cat(parts))) < sum(map(len, parts)):
        raise UserError(f"{place}: a node is in two of its parts for training, validation and testing")
    return parts[0], parts[1], parts[2]


# -- From two tables ---------------------------------------------------------------------------------------------------


def _tables(folder: Path) -> dict[str, Any]:
    nodes, edges = _rows(folder / "nodes.csv"), _rows(folder / "edges.csv")
    tables: dict[str, Any] = {"y": np.array([row[-1] for row in nodes])}
    tables["x"] = _numbers(folder / "nodes.csv", [row[:-1] for row in nodes])
    table = _numbers(folder / "edges.csv", edges)
    if table.shape[1] not in (2, 3):
        raise UserError(
            f"{folder / 'edges.csv'} has {table.shape[1]} columns, and must have source, target and perhaps weight"
        )
    if (table[:, :2] % 1).any():
        raise UserError(f"{folder / 'edges.csv'}: an edge's ends must be whole numbers")
    tables["edges"] = table[:, :2].astype(np.int64).T
    tables["weights"] = table[:, 2] if table.shape[1] == 3 else None
    return tables


def _rows(path: Path) -> list[list[str]]:
    """The rows without the header, a first line whose first cell is not a number."""
    no_larger(path, LARGEST_FILE)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {SAID}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no table of text ({error}): {SAID}") from None
    if rows and not _is_number(rows[0][0]):
        rows = rows[1:]
    if not rows:
        raise UserError(f"{path} has no rows: {SAID}")
    if odd := [number for number, row in enumerate(rows, 1) if len(row) != len(rows[0])]:
        raise UserError(f"{path}: row {odd[0]} has {len(rows[odd[0] - 1])} cells, and the first has {len(rows[0])}")
    return rows


def _numbers(path: Path, rows: list[list[str]]) -> NDArray[Any]:
    try:
        return np.array(rows, dtype=np.float64)
    except ValueError as error:
        raise UserError(f"{path} must hold numbers, but for the label ({error})") from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
