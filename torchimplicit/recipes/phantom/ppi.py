"""PPI: 24 tissues' graphs of interacting proteins, 121 labels a node (Zitnik and Leskovec 2017; Hamilton et al.)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch_geometric.data import Data
from torch_geometric.datasets import PPI

from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import cache_folder, no_larger, unchanged

LARGEST_FILE = 1 << 30
"""Bytes of a graph: twenty times the largest of the three."""

SPLITS = ("train", "valid", "test")
"""20, 2 and 2 graphs, as published."""


def load(data_dir: Path | None = None) -> tuple[list[Data], list[Data], list[Data]]:
    """The graphs for training, validation and testing.

    Each has ``x`` ``[nodes, 50]``, ``edge_index`` with every edge in both directions and no loops, and ``y``
    ``[nodes, 121]``, zeros and ones (float32).

    Args:
        data_dir: holds ``train_graph.json``, ``train_feats.npy`` and the other files, itself or in ``raw``; ``None``:
            torch-geometric downloads them.

    Raises:
        UserError: a file is missing, cut short, or contradicts another one.
    """
    folder = locate(data_dir)
    train, validation, test = (_split(folder, split) for split in SPLITS)
    return train, validation, test


def locate(data_dir: Path | None) -> Path:
    """The folder with the files.

    Raises:
        UserError: there is none.
    """
    if data_dir is None:
        folder = cache_folder("ppi") / "raw"
        if not (folder / "train_graph.json").is_file():
            try:
                folder = Path(PPI(str(cache_folder("ppi"))).raw_dir)
            except Exception as error:  # of the network, the file system or the archive: many kinds
                raise UserError(
                    f"PPI cannot be downloaded ({error}); if this machine has no network, fetch it elsewhere and give "
                    "its folder with --data-dir"
                ) from None
        unchanged(folder, [path.name for split in SPLITS for path in folder.glob(f"{split}_*")])
        return folder
    if not data_dir.is_dir():
        raise UserError(f"{data_dir} is no folder: --data-dir must be the folder that holds train_graph.json")
    for place in (data_dir, data_dir / "raw"):
        if (place / "train_graph.json").is_file():
            return place
    raise UserError(f"{data_dir} holds no train_graph.json: --data-dir must be the folder of PPI's files")


def _split(folder: Path, split: str) -> list[Data]:
    x = _array(folder / f"{split}_feats.npy", 2)
    y = _array(folder / f"{split}_labels.npy", 2)
    owner = _array(folder / f"{split}_graph_id.npy", 1).astype(np.int64)
    nodes = len(x)
    for name, found in (("labels", y), ("graph_id", owner)):
        if len(found) != nodes:
            raise UserError(
                f"{folder / f'{split}_{name}.npy'} has {len(found)} nodes, and {split}_feats.npy has {nodes}: they "
                "belong to different sets"
            )
    if nodes == 0 or (np.diff(owner) < 0).any():
        raise UserError(f"{folder / f'{split}_graph_id.npy'}: the nodes of a graph must follow one another")
    edges = _edges(folder / f"{split}_graph.json", owner)
    graphs = []
    for kind in np.unique(owner).tolist():
        inside = np.flatnonzero(owner == kind)
        own = edges[:, owner[edges[0]] == kind] - inside[0]
        graphs.append(
            Data(
                x=torch.from_numpy(x[inside]).float(),
                edge_index=torch.from_numpy(np.ascontiguousarray(own)),
                y=torch.from_numpy(y[inside]).float(),
            )
        )
    return graphs


def _edges(path: Path, owner: NDArray[np.int64]) -> NDArray[np.int64]:
    """Every edge in both directions, once, without loops: ``[2, edges]``."""
    nodes = len(owner)
    no_larger(path, LARGEST_FILE)
    try:
        with path.open(encoding="utf-8") as file:
            links = json.load(file)["links"]
        pairs = [(link["source"], link["target"]) for link in links]
        if not all(type(end) is int for pair in pairs for end in pair):
            raise TypeError("an edge's ends are whole numbers")
        ends = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{path} is cut short or of another kind: it must be a graph in node-link form ({error})"
        ) from None
    if ends.size and (ends.min() < 0 or ends.max() >= nodes):
        raise UserError(
            f"{path} has edges between the nodes {ends.min()} to {ends.max()}, and there are nodes 0 to {nodes - 1}"
        )
    apart = owner[ends[:, 0]] != owner[ends[:, 1]]
    if apart.any():
        one, other = ends[apart][0]
        raise UserError(f"{path} has an edge between {one} and {other}, which lie in different graphs")
    ends = ends[ends[:, 0] != ends[:, 1]]
    return np.unique(np.concatenate([ends, ends[:, ::-1]]), axis=0).T


def _array(path: Path, dims: int) -> NDArray[Any]:
    try:
        found = np.lib.format.open_memmap(path, mode="r")  # a header that promises too much takes no memory
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    except Exception as error:  # headers are read as Python, which can be wrong in many ways
        raise UserError(f"{path} is cut short or no .npy file of numbers: {' '.join(str(error).split())}") from None
    if found.ndim != dims or found.dtype.kind not in "biuf":
        raise UserError(f"{path} has shape {found.shape} of {found.dtype}, and must be numbers in {dims} dimensions")
    if not np.isfinite(found).all():
        raise UserError(f"{path} holds NaN or infinity")
    return np.array(found)
