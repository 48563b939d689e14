"""The graphs' loaders on made-up files, and what they say of bad ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("torch_geometric")
pytest.importorskip("sklearn")

from torchimplicit.recipes.phantom import graph_data as tu
from torchimplicit.recipes.phantom.graph_data import chains, folds
from torchimplicit.recipes.runtime.errors import UserError

# A triangle; two nodes without an edge; a path of three, whose middle is linked, and an isolated node.
TU = {
    "A": ["1, 2", "2, 1", "2, 3", "3, 2", "1, 3", "3, 1", "6, 7", "7, 6", "7, 8", "8, 7"],
    "graph_indicator": ["1"] * 3 + ["2"] * 2 + ["3"] * 4,
    "graph_labels": ["-1", "1", "-1"],
    "node_labels": list("676777916"),
    "node_attributes": [f"{i}.5, -1" for i in range(9)],
}


def write(folder, changes=None, prefix="COX2", without=()):
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in {**TU, **(changes or {})}.items():
        if name not in without:
            (folder / f"{prefix}_{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_the_graphs_are_those_of_the_files(tmp_path):
    found = tu.load("COX2", write(tmp_path))
    assert (len(found.graphs), found.classes, found.features) == (3, 2, 4)
    assert found.labels == [0, 1, 0]
    triangle, pair, path = found.graphs
    assert sorted(zip(*triangle.edge_index.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    assert triangle.x.argmax(dim=1).tolist() == [1, 2, 1]
    assert (pair.num_nodes, pair.edge_index.shape) == (2, (2, 0))
    assert sorted(zip(*path.edge_index.tolist(), strict=True)) == [(0, 1), (1, 0), (1, 2), (2, 1)]
    assert path.x.shape == (4, 4)


def test_attributes_are_appended_on_request(tmp_path):
    found = tu.load("COX2", write(tmp_path), attributes=True)
    assert found.features == 6
    assert found.graphs[1].x[0, 4:].tolist() == [3.5, -1.0]


def test_every_edge_keeps_its_label(tmp_path):
    of_edges = {"1, 2": 0, "2, 3": 1, "1, 3": 2, "6, 7": 3, "7, 8": 4}
    labels = [
        str(of_edges[edge] if edge in of_edges else of_edges[", ".join(edge.split(", ")[::-1])]) for edge in TU["A"]
    ]
    found = tu.load("COX2", write(tmp_path, {"edge_labels": labels}))
    triangle, pair, path = found.graphs
    kinds = dict(zip(zip(*triangle.edge_index.tolist(), strict=True), triangle.edge_label.tolist(), strict=True))
    assert kinds == {(0, 1): 0, (1, 0): 0, (1, 2): 1, (2, 1): 1, (0, 2): 2, (2, 0): 2}
    assert pair.edge_label.tolist() == []
    assert sorted(path.edge_label.tolist()) == [3, 3, 4, 4]
    with pytest.raises(UserError, match="9 lines, and there are 10 edges"):
        tu.load("COX2", write(tmp_path, {"edge_labels": labels[1:]}))


@pytest.mark.parametrize("place", ["COX2", "COX2/raw", "COX2_full"])
def test_the_files_are_found_below_the_folder(tmp_path, place):
    write(tmp_path / place, prefix=place.split("/")[0])
    assert len(tu.load("COX2", tmp_path).graphs) == 3


def test_the_model_takes_them_in_a_batch(tmp_path):
    from torch_geometric.data import Batch

    from torchimplicit.models import IGNN, ignn_tu

    found = tu.load("COX2", write(tmp_path))
    batch = Batch.from_data_list(found.graphs)
    model = IGNN(ignn_tu(found.features))
    out = model(batch.x, batch.edge_index, batch=batch.batch, graphs=batch.num_graphs)
    out.sum().backward()
    assert out.shape == (3, 2)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"A": [*TU["A"][:-1], "8,"]}, "COX2_A.txt is cut short"),
        ({"A": TU["A"][:-1]}, "between 7 and 8 in one direction only"),
        ({"A": [*TU["A"], "9, 10", "10, 9"]}, "line 11: an edge from 9 to 10, and there are nodes 1 to 9"),
        ({"A": [*TU["A"], "0, 1", "1, 0"]}, "line 11: an edge from 0 to 1"),
        ({"A": [*TU["A"], "1, 4", "4, 1"]}, "line 11: .* lie in the graphs 1 and 2"),
        ({"A": ["1, 2, 3"]}, "3 columns"),
        ({"graph_labels": ["-1", "1"]}, "has 2 labels"),
        ({"graph_labels": ["1", "1", "1"]}, "one label only"),
        ({"graph_labels": ["-1", "1", "-1", "1"]}, "has 4 labels"),
        ({"graph_labels": []}, "has 0 labels"),
        ({"graph_labels": ["-1", "x", "-1"]}, "COX2_graph_labels.txt is cut short or of another kind"),
        ({"graph_indicator": ["1"] * 5 + ["3"] * 4}, "graph 2 has no node"),
        ({"graph_indicator": ["1", "2", "1", "2", "2", "3", "3", "3", "3"]}, "not in order"),
        ({"node_labels": list("67677791")}, "COX2_node_labels.txt has 8 lines, and there are 9 nodes"),
    ],
)
def test_bad_files_are_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        tu.load("COX2", write(tmp_path, changes))


@pytest.mark.parametrize("missing", ["graph_indicator", "graph_labels"])
def test_a_missing_file_is_named(tmp_path, missing):
    write(tmp_path, without=(missing,))
    with pytest.raises(UserError, match=f"COX2_{missing}.txt cannot be read"):
        tu.load("COX2", tmp_path)


def test_a_set_is_found_without_its_name_and_without_node_labels(tmp_path):
    write(tmp_path, without=("node_labels", "node_attributes"))
    found = tu.load("", tmp_path)
    degrees = torch.cat([torch.bincount(g.edge_index[0], minlength=g.num_nodes) for g in found.graphs])
    x = torch.cat([g.x for g in found.graphs])
    assert torch.equal(x.argmax(dim=1), torch.unique(degrees, return_inverse=True)[1])
    (tmp_path / "MUTAG_A.txt").write_text("1, 2\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"several sets \(COX2, MUTAG\): say which with --data"):
        tu.load("", tmp_path)
    with pytest.raises(UserError, match=r"holds no DD_A.txt.*it holds COX2, MUTAG"):
        tu.load("DD", tmp_path)
    with pytest.raises(UserError, match="say which set"):
        tu.load("")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        tu.load("COX2", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no PROTEINS_A\.txt"):
        tu.load("PROTEINS", write(tmp_path))


def test_a_set_without_any_edge_is_taken(tmp_path):
    found = tu.load("COX2", write(tmp_path, {"A": []}))
    assert [graph.num_edges for graph in found.graphs] == [0, 0, 0]


# PPI


def write_ppi(folder, **changes):
    """Two graphs of 3 and 2 nodes in every split; 0-1, 1-1 and 3-4 are linked."""
    rng = np.random.default_rng(0)
    for split in tu.PPI_SPLITS:
        links = changes.get("links", [(0, 1), (1, 1), (3, 4)])
        graph = {"directed": False, "nodes": [], "links": [{"source": s, "target": t} for s, t in links]}
        (folder / f"{split}_graph.json").write_text(changes.get("json", json.dumps(graph)), encoding="utf-8")
        np.save(folder / f"{split}_feats.npy", rng.normal(size=(changes.get("nodes", 5), 50)))
        np.save(folder / f"{split}_labels.npy", rng.integers(2, size=(5, 121)))
        np.save(folder / f"{split}_graph_id.npy", np.array(changes.get("owner", [1, 1, 1, 2, 2])))
    return folder


def test_the_proteins_of_every_split(tmp_path):
    splits = tu.load_ppi(write_ppi(tmp_path))
    assert [len(graphs) for graphs in splits] == [2, 2, 2]
    first, second = splits[0]
    assert first.edge_index.tolist() == [[0, 1], [1, 0]]
    assert (first.x.shape, first.y.shape) == ((3, 50), (3, 121))
    assert second.edge_index.tolist() == [[0, 1], [1, 0]]
    assert first.y.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"json": '{"links": ['}, "train_graph.json is cut short"),
        ({"json": "[]"}, "node-link"),
        ({"links": [(0, 7)]}, "nodes 0 to 7, and there are nodes 0 to 4"),
        ({"links": [(0, 4)]}, "between 0 and 4, which lie in different graphs"),
        ({"nodes": 6}, "train_labels.npy has 5 nodes"),
        ({"owner": [1, 2, 1, 2, 2]}, "follow one another"),
        ({"owner": [[1, 1, 1, 2, 2]]}, "train_graph_id.npy has shape"),
    ],
)
def test_bad_files_of_ppi_are_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        tu.load_ppi(write_ppi(tmp_path, **changes))


def test_a_truncated_or_missing_array_is_named(tmp_path):
    write_ppi(tmp_path)
    path = tmp_path / "valid_feats.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"valid_feats\.npy"):
        tu.load_ppi(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"valid_feats\.npy cannot be read"):
        tu.load_ppi(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        tu.load_ppi(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no train_graph\.json"):
        tu.load_ppi(tmp_path / "empty")


# chains


def test_only_the_first_node_of_a_chain_knows_its_class():
    data = chains(10, seed=0)
    assert data.x.shape == (400, 100)
    assert data.edge_index.shape == (2, 360)
    assert (data.edge_index[1] - data.edge_index[0] == 1).all()
    assert data.x.sum() == 40
    first = data.position == 0
    assert torch.equal(data.x[first].argmax(dim=1), data.y[first])
    assert (data.x[~first] == 0).all()
    assert (data.y[data.edge_index[0]] == data.y[data.edge_index[1]]).all()
    assert torch.bincount(data.y).tolist() == [200, 200]


def test_the_parts_of_the_chains_are_disjoint_and_reproducible():
    data, again, other = chains(10, seed=3), chains(10, seed=3), chains(10, seed=4)
    masks = [data.train_mask, data.val_mask, data.test_mask]
    assert [int(mask.sum()) for mask in masks] == [20, 100, 200]
    assert (sum(mask.int() for mask in masks) <= 1).all()
    assert torch.equal(data.test_mask, again.test_mask)
    assert not torch.equal(data.test_mask, other.test_mask)


def test_chains_that_are_too_short_are_refused():
    with pytest.raises(UserError, match="at least 8"):
        chains(7, seed=0)
    chains(8, seed=0)
    with pytest.raises(UserError, match="do not fit"):
        chains(10, seed=0, classes=5, features=4)


# folds


def test_the_folds_cover_everything_and_test_on_nothing_they_train_on():
    labels = [0] * 70 + [1] * 30
    made = folds(labels, 10, validation=1 / 9)
    assert sorted(index for fold in made for index in fold.test) == list(range(100))
    for fold in made:
        assert sorted([*fold.train, *fold.validation, *fold.test]) == list(range(100))
        assert [len(part) for part in fold] == [80, 10, 10]
        assert sum(labels[i] for i in fold.test) == 3
        assert sum(labels[i] for i in fold.validation) == 3
    assert folds(labels) == folds(labels)
    assert folds(labels) != folds(labels, seed=1)


def test_a_class_too_small_for_the_folds_is_refused():
    with pytest.raises(UserError, match="class 1 has 5 samples, too few for 10 folds"):
        folds([0] * 50 + [1] * 5)
