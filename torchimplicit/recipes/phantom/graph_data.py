"""Data sets of graphs, and the folds of a cross-validation."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import cache_folder, no_larger, unchanged

if TYPE_CHECKING:
    from torch_geometric.data import Data

# -- Cross-validation in which the test part chooses nothing -----------------------------------------------------------


class Fold(NamedTuple):
    """Indices of the samples in each part. The three parts are disjoint and cover all samples."""

    train: list[int]
    validation: list[int]
    test: list[int]


def folds(labels: Sequence[int], count: int = 10, validation: float = 0.1, seed: int = 42) -> list[Fold]:
    """Stratified folds.

    The test parts are disjoint and cover all samples. The published runs report the best epoch on the test part; here
    a part of the training samples is set apart to choose the epoch by.

    Args:
        labels: labels of every sample.
        count: how many folds.
        validation: the share of the samples outside the test part that is set apart.
        seed: seed of the shuffle.

    Raises:
        UserError: a class has too few samples.
    """
    from sklearn.model_selection import StratifiedKFold, train_test_split

    rarest, members = min(Counter(labels).items(), key=lambda item: item[1])
    if members < max(count, 2):
        raise UserError(f"class {rarest} has {members} samples, too few for {count} folds")
    y = np.asarray(labels)
    splits = []
    for rest, test in StratifiedKFold(count, shuffle=True, random_state=seed).split(np.zeros(len(y)), y):
        train, chosen = train_test_split(rest, test_size=validation, random_state=seed, stratify=y[rest])
        splits.append(Fold(sorted(train.tolist()), sorted(chosen.tolist()), test.tolist()))
    return splits


# -- Sets in the text format of the TU collection (Morris et al. 2020, arXiv 2007.08663) ------------------


LARGEST_FILE = 1 << 28
"""Largest file accepted, in bytes: a hundred times the largest of COX2 and PROTEINS."""


def batch(graphs: list[Data]) -> Any:
    """Merge graphs into one."""
    from torch_geometric.data import Batch

    return Batch.from_data_list(graphs)


class GraphSet(NamedTuple):
    """Labelled graphs.

    Attributes:
        graphs: ``x`` ``[nodes, features]`` (float32), ``edge_index`` ``[2, edges]``, ``edge_label`` ``[edges]`` (1 if
            the set has none) and ``y`` ``[1]`` each.
        classes: how many labels there are.
    """

    graphs: list[Data]
    classes: int

    @property
    def features(self) -> int:
        """Number of features per node."""
        return self.graphs[0].x.shape[1]

    @property
    def labels(self) -> list[int]:
        """The labels of all graphs."""
        return [int(graph.y) for graph in self.graphs]


def load(name: str, data_dir: Path | None = None, attributes: bool = False) -> GraphSet:
    """A data set of the collection.

    The features of a node are its label, one-hot over those that occur: what the published IGNN runs have; in a set
    without labels, its attributes, or where there are none either its degree, one-hot up to :data:`DEGREES`. Isolated
    nodes and graphs without edges are kept (the model gives every node a loop to itself).

    Args:
        name: its name; empty for the set that lies in ``data_dir``.
        data_dir: holds ``<name>_A.txt`` and the other files, itself or in ``<name>``, ``<name>_full`` or
            ``<name>/raw``; ``None``: torch-geometric downloads them.
        attributes: whether to append the nodes' real-valued attributes, where the set has any.

    Raises:
        UserError: a file is missing, cut short, or contradicts another one.
    """
    from torch_geometric.data import Data

    folder, prefix = locate(name, data_dir)
    label = _integers(folder / f"{prefix}_graph_labels.txt")
    owner = _integers(folder / f"{prefix}_graph_indicator.txt")
    graphs, nodes = len(label), len(owner)
    indicator = folder / f"{prefix}_graph_indicator.txt"
    if graphs == 0 or owner.min(initial=1) < 1 or owner.max(initial=0) != graphs or (np.diff(owner) < 0).any():
        raise UserError(
            f"{indicator} names the graphs {owner.min(initial=0)} to {owner.max(initial=0)}, and "
            f"{prefix}_graph_labels.txt has {graphs} labels: one of the two is cut short, or their nodes are not in "
            "order"
        )
    sizes = np.bincount(owner - 1, minlength=graphs)
    if (sizes == 0).any():
        raise UserError(f"{indicator}: graph {int(np.argmin(sizes)) + 1} has no node, and needs at least one")
    edges = _edges(folder / f"{prefix}_A.txt", owner)
    x = _features(folder, prefix, nodes, attributes, edges)
    kinds, y = np.unique(label, return_inverse=True)
    if len(kinds) < 2:
        raise UserError(f"{folder / f'{prefix}_graph_labels.txt'} has one label only: there is nothing to learn")
    first = np.cumsum(sizes) - sizes
    counts = np.bincount(owner[edges[0]] - 1, minlength=graphs)
    order, ends = np.argsort(edges[0], kind="stable"), np.cumsum(counts)[:-1]
    parts = np.split(edges[:, order], ends, axis=1)
    labels = np.split(_edge_labels(folder, prefix, edges.shape[1])[order], ends)
    loaded = [
        Data(
            x=x[start : start + size],
            edge_index=torch.from_numpy(np.ascontiguousarray(part - start)),
            edge_label=torch.from_numpy(label),
            y=torch.tensor([kind]),
        )
        for start, size, part, label, kind in zip(
            first.tolist(), sizes.tolist(), parts, labels, y.tolist(), strict=True
        )
    ]
    return GraphSet(loaded, len(kinds))


def locate(name: str, data_dir: Path | None) -> tuple[Path, str]:
    """The folder with the files, and what their names begin with.

    Raises:
        UserError: there is none.
    """
    if data_dir is None:
        if not name:
            raise UserError(
                "say which set: --data with a name of the TU collection, such as MUTAG, --data-dir with the folder of "
                "its text files, or both"
            )
        folder = cache_folder("tudataset") / name / "raw"
        if not (folder / f"{name}_A.txt").is_file():
            try:
                from torch_geometric.datasets import TUDataset

                folder = Path(TUDataset(str(cache_folder("tudataset")), name).raw_dir)
            except Exception as error:  # of the network, the file system or the archive: many kinds
                raise UserError(
                    f"{name} cannot be downloaded ({error}); if this machine has no network, fetch it elsewhere and "
                    "give its folder with --data-dir"
                ) from None
        unchanged(folder, [path.name for path in folder.glob(f"{name}_*.txt")])
        return folder, name
    if not data_dir.is_dir():
        raise UserError(f"{data_dir} is not a folder: --data-dir must be the folder that holds {name or 'NAME'}_A.txt")
    if not name:
        return _only(data_dir)
    for prefix in (name, f"{name}_full"):
        for place in (data_dir, data_dir / prefix, data_dir / prefix / "raw"):
            if (place / f"{prefix}_A.txt").is_file():
                return place, prefix
    raise UserError(
        f"{data_dir} holds no {name}_A.txt, nor does a folder {name} in it: --data-dir must be the folder of the TU "
        f"collection's text files; it holds {_names(data_dir) or 'no set'}"
    )


def _sets(folder: Path) -> list[Path]:
    return sorted(path for pattern in ("*_A.txt", "*/*_A.txt", "*/raw/*_A.txt") for path in folder.glob(pattern))


def _names(folder: Path) -> str:
    return ", ".join(path.name.removesuffix("_A.txt") for path in _sets(folder))


def _only(folder: Path) -> tuple[Path, str]:
    names = _sets(folder)
    if not names:
        raise UserError(
            f"{folder} holds no file NAME_A.txt: --data-dir must be the folder of a set in the text format of the TU "
            "collection"
        )
    if len(names) > 1:
        raise UserError(f"{folder} holds several sets ({_names(folder)}): say which with --data")
    return names[0].parent, names[0].name.removesuffix("_A.txt")


DEGREES = 32
"""Number of degrees told apart; higher degrees count as this one."""


def _features(folder: Path, prefix: str, nodes: int, attributes: bool, edges: NDArray[np.int64]) -> torch.Tensor:
    path = folder / f"{prefix}_node_labels.txt"
    attributes_file = folder / f"{prefix}_node_attributes.txt"
    if path.is_file() or not attributes_file.is_file():
        label = _integers(path) if path.is_file() else np.minimum(np.bincount(edges[0], minlength=nodes), DEGREES)
        _same_length(path, len(label), nodes)
        _, kind = np.unique(label, return_inverse=True)
        x = torch.nn.functional.one_hot(torch.from_numpy(kind)).float()
        if not attributes or not attributes_file.is_file():
            return x
    else:
        x = torch.zeros(nodes, 0)
    path = attributes_file
    values = _table(path, np.float64)
    _same_length(path, len(values), nodes)
    if not np.isfinite(values).all():
        raise UserError(f"{path} holds NaN or infinity; repair it, or train without attributes")
    return torch.cat([x, torch.from_numpy(values).float()], dim=1)


def _edges(path: Path, owner: NDArray[np.int64]) -> NDArray[np.int64]:
    """``[2, edges]``, counted from zero."""
    table = _table(path, np.int64)
    if table.size and table.shape[1] != 2:
        raise UserError(f"{path} has {table.shape[1]} columns, and an edge has two ends")
    edges = table.reshape(-1, 2).T - 1
    wrong = (edges < 0) | (edges >= len(owner))
    if wrong.any():
        line = int(wrong.any(axis=0).argmax())
        raise UserError(
            f"{path}, line {line + 1}: an edge from {table[line, 0]} to {table[line, 1]}, and there are nodes 1 to "
            f"{len(owner)} only"
        )
    apart = owner[edges[0]] != owner[edges[1]]
    if apart.any():
        line = int(apart.argmax())
        raise UserError(
            f"{path}, line {line + 1}: an edge from {table[line, 0]} to {table[line, 1]}, which lie in the graphs "
            f"{owner[edges[0, line]]} and {owner[edges[1, line]]}"
        )
    there, back = (set(zip(*ends, strict=True)) for ends in (edges.tolist(), edges[::-1].tolist()))
    if there != back:
        one, other = min(there ^ back)
        raise UserError(
            f"{path} has the edge between {one + 1} and {other + 1} in one direction only, and these graphs are "
            "undirected: the file is cut short"
        )
    return edges


def _edge_labels(folder: Path, prefix: str, edges: int) -> NDArray[np.int64]:
    path = folder / f"{prefix}_edge_labels.txt"
    if not path.is_file():
        return np.ones(edges, dtype=np.int64)
    labels = _integers(path)
    _same_length(path, len(labels), edges, "edges")
    return labels


def _integers(path: Path) -> NDArray[np.int64]:
    """Read one integer per line."""
    table = _table(path, np.int64)
    if table.size and table.shape[1] != 1:
        raise UserError(f"{path} has {table.shape[1]} columns, and must have one")
    return table.reshape(-1)


def _table(path: Path, kind: type) -> NDArray:
    no_larger(path, LARGEST_FILE)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="loadtxt: input contained no data")
            return np.loadtxt(path, dtype=kind, delimiter=",", ndmin=2)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or 'there is no such file'})") from None
    except ValueError as error:
        raise UserError(f"{path} is cut short or of another kind: {error}") from None


def _same_length(path: Path, lines: int, count: int, of: str = "nodes") -> None:
    if lines != count:
        raise UserError(f"{path} has {lines} lines, and there are {count} {of}: one of the files is cut short")


# -- PPI: 24 tissues' graphs of interacting proteins, 121 labels a node (Zitnik and Leskovec 2017; Hamilton et al.) ----


LARGEST_PPI = 1 << 30
"""Largest file of a graph accepted, in bytes: twenty times the largest of the three."""

PPI_SPLITS = ("train", "valid", "test")
"""Graphs for training, validation and test (20, 2 and 2), as published."""


def load_ppi(data_dir: Path | None = None) -> tuple[list[Data], list[Data], list[Data]]:
    """The graphs for training, validation and testing.

    Each has ``x`` ``[nodes, 50]``, ``edge_index`` with every edge in both directions and no loops, and ``y``
    ``[nodes, 121]``, zeros and ones (float32).

    Args:
        data_dir: holds ``train_graph.json``, ``train_feats.npy`` and the other files, itself or in ``raw``; ``None``:
            torch-geometric downloads them.

    Raises:
        UserError: a file is missing, cut short, or contradicts another one.
    """
    folder = locate_ppi(data_dir)
    train, validation, test = (_split(folder, split) for split in PPI_SPLITS)
    return train, validation, test


def locate_ppi(data_dir: Path | None) -> Path:
    """The folder with the files.

    Raises:
        UserError: there is none.
    """
    if data_dir is None:
        folder = cache_folder("ppi") / "raw"
        if not (folder / "train_graph.json").is_file():
            try:
                from torch_geometric.datasets import PPI

                folder = Path(PPI(str(cache_folder("ppi"))).raw_dir)
            except Exception as error:  # of the network, the file system or the archive: many kinds
                raise UserError(
                    f"PPI cannot be downloaded ({error}); if this machine has no network, fetch it elsewhere and give "
                    "its folder with --data-dir"
                ) from None
        unchanged(folder, [path.name for split in PPI_SPLITS for path in folder.glob(f"{split}_*")])
        return folder
    if not data_dir.is_dir():
        raise UserError(f"{data_dir} is not a folder: --data-dir must be the folder that holds train_graph.json")
    for place in (data_dir, data_dir / "raw"):
        if (place / "train_graph.json").is_file():
            return place
    raise UserError(f"{data_dir} holds no train_graph.json: --data-dir must be the folder of PPI's files")


def _split(folder: Path, split: str) -> list[Data]:
    from torch_geometric.data import Data

    x = _array(folder / f"{split}_feats.npy", 2)
    y = _array(folder / f"{split}_labels.npy", 2)
    owner = _array(folder / f"{split}_graph_id.npy", 1).astype(np.int64)
    nodes = len(x)
    for name, values in (("labels", y), ("graph_id", owner)):
        if len(values) != nodes:
            raise UserError(
                f"{folder / f'{split}_{name}.npy'} has {len(values)} nodes, and {split}_feats.npy has {nodes}: they "
                "belong to different sets"
            )
    if nodes == 0 or (np.diff(owner) < 0).any():
        raise UserError(f"{folder / f'{split}_graph_id.npy'}: the nodes of a graph must follow one another")
    edges = _links(folder / f"{split}_graph.json", owner)
    graphs = []
    for kind in np.unique(owner).tolist():
        inside = np.flatnonzero(owner == kind)
        inner = edges[:, owner[edges[0]] == kind] - inside[0]
        graphs.append(
            Data(
                x=torch.from_numpy(x[inside]).float(),
                edge_index=torch.from_numpy(np.ascontiguousarray(inner)),
                y=torch.from_numpy(y[inside]).float(),
            )
        )
    return graphs


def _links(path: Path, owner: NDArray[np.int64]) -> NDArray[np.int64]:
    """Every edge in both directions, once, without loops: ``[2, edges]``."""
    nodes = len(owner)
    no_larger(path, LARGEST_PPI)
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
        array = np.lib.format.open_memmap(path, mode="r")  # a header that promises too much takes no memory
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    except Exception as error:  # headers are read as Python, which can be wrong in many ways
        raise UserError(f"{path} is cut short or no .npy file of numbers: {' '.join(str(error).split())}") from None
    if array.ndim != dims or array.dtype.kind not in "biuf":
        raise UserError(f"{path} has shape {array.shape} of {array.dtype}, and must be numbers in {dims} dimensions")
    if not np.isfinite(array).all():
        raise UserError(f"{path} holds NaN or infinity")
    return np.array(array)


# -- Directed chains whose class stands on their first node alone (Gu et al. 2020, section 6.1) ------------------------


SPLIT = (20, 100, 200)
"""Nodes for training, validation and test, over all chains."""


def chains(length: int, seed: int, classes: int = 2, per_class: int = 20, features: int = 100) -> Data:
    """One graph of ``classes * per_class`` chains with the edges :math:`i\\to i+1`.

    The first node of a chain has the class, one-hot, in its first entries; every other feature is zero. Every node of
    a chain has the chain's label, so that its class has to travel the whole way. The nodes of the three parts are
    drawn at random.

    Args:
        length: nodes in a chain.
        seed: seed of the parts.
        classes, per_class, features: at most as many classes as features.

    Returns:
        ``x``, ``edge_index``, ``y`` and the bool ``[nodes]`` masks ``train_mask``, ``val_mask`` and ``test_mask``;
        ``position`` ``[nodes]`` is each node's place in its chain.

    Raises:
        UserError: the chains have fewer nodes than the parts need.
    """
    from torch_geometric.data import Data

    count = classes * per_class
    nodes = count * length
    if length < 1 or nodes < sum(SPLIT):
        raise UserError(
            f"--length {length} makes {max(nodes, 0)} nodes, and the parts need {sum(SPLIT)}: take chains of at least "
            f"{-(-sum(SPLIT) // count)}"
        )
    if classes > features:
        raise UserError(f"{classes} classes do not fit into {features} features")
    index = torch.arange(nodes).reshape(count, length)
    kind = torch.arange(count) // per_class
    x = torch.zeros(nodes, features)
    x[index[:, 0], kind] = 1.0
    order = torch.randperm(nodes, generator=torch.Generator().manual_seed(seed)).split([*SPLIT, nodes - sum(SPLIT)])
    masks = [torch.zeros(nodes, dtype=torch.bool).index_fill_(0, part, True) for part in order[:3]]
    return Data(
        x=x,
        edge_index=torch.stack([index[:, :-1].flatten(), index[:, 1:].flatten()]),
        y=kind.repeat_interleave(length),
        position=torch.arange(length).repeat(count),
        train_mask=masks[0],
        val_mask=masks[1],
        test_mask=masks[2],
    )
