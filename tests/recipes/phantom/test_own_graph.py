"""A graph of one's own: its files, its parts, and an IGNN that classifies its nodes."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("lightning")
pytest.importorskip("tyro")

import torch

from torchimplicit import cli
from torchimplicit.recipes.phantom.own_graph import read, split
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.run import Run
from torchimplicit.recipes.runtime.trainer import Results


def arrays(**changes):
    """Two cliques of ten nodes whose features say nothing but for one node each."""
    ends = np.array([(a, b) for k in (0, 10) for a in range(k, k + 10) for b in range(a + 1, k + 10)])
    x = np.zeros((20, 3), np.float32)
    x[0, 0] = x[10, 1] = 1
    return {"x": x, "edge_index": ends.T, "y": np.repeat([7, 9], 10), **changes}


def npz(path, **changes):
    given = {name: value for name, value in arrays(**changes).items() if value is not None}
    np.savez(path / "graph.npz", **given)
    return path / "graph.npz"


def tables(folder):
    given = arrays()
    rows = [
        ",".join(map(str, (*features, f"class {label}")))
        for features, label in zip(given["x"], given["y"], strict=True)
    ]
    (folder / "nodes.csv").write_text("a,b,c,label\n" + "\n".join(rows), encoding="utf-8")
    links = [f"{a},{b},0.5" for a, b in given["edge_index"].T]
    (folder / "edges.csv").write_text("\n".join(links), encoding="utf-8")
    return folder


def test_both_forms_are_read_alike(tmp_path):
    one, other = read(npz(tmp_path)), read(tables(tmp_path))
    for name in ("x", "edges", "y"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name))
    assert one.edges.shape == (2, 180)
    assert (one.names, other.names) == (("7", "9"), ("class 7", "class 9"))
    assert one.weights is None
    assert other.weights.unique().tolist() == [0.5]
    assert read(npz(tmp_path), undirected=False).edges.shape == (2, 90)


def test_sparse_features_and_given_parts(tmp_path):
    sparse = {"x_data": np.ones(2, np.float32), "x_indices": np.array([0, 1]), "x_shape": np.array([20, 3])}
    sparse["x_indptr"] = np.cumsum([0, *(int(node in (0, 10)) for node in range(20))])
    parts = {"train_idx": np.array([0, 10]), "val_idx": np.array([1, 11]), "test_mask": np.arange(20) > 15}
    found = read(npz(tmp_path, x=None, **sparse, **parts))
    torch.testing.assert_close(found.x, torch.from_numpy(arrays()["x"]))
    assert [part.tolist() for part in split(found, (0.5, 0.2), 0)] == [[0, 10], [1, 11], [16, 17, 18, 19]]
    drawn = split(read(npz(tmp_path)), (0.5, 0.2), 0)
    assert [len(part) for part in drawn] == [10, 4, 6]
    assert sorted(torch.cat(drawn).tolist()) == list(range(20))
    assert int((found.y[drawn[0]] == 0).sum()) == 5


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"y": None}, "has no y; it holds x, edge_index"),
        ({"edge_index": np.array([[0], [20]])}, "edges between the nodes 0 to 20, and there are nodes 0 to 19"),
        ({"edge_index": np.zeros((3, 3))}, "must be whole numbers"),
        ({"y": np.zeros(20)}, "one label only"),
        ({"y": np.arange(5)}, "5 labels and 20 nodes"),
        ({"x": np.full((20, 1), np.nan)}, "NaN or infinity"),
        ({"train_idx": np.array([0]), "val_idx": np.array([0]), "test_idx": np.array([1])}, "in two of its parts"),
    ],
)
def test_graphs_that_are_refused(tmp_path, changes, match):
    with pytest.raises(UserError, match=match):
        read(npz(tmp_path, **changes))


def test_tables_that_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nodes\.csv cannot be read"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"is not there: --data-dir must be an \.npz file"):
        read(tmp_path / "none.npz")
    tables(tmp_path)
    (tmp_path / "edges.csv").write_text("0,1\n2\n", encoding="utf-8")
    with pytest.raises(UserError, match="row 2 has 1 cells, and the first has 2"):
        read(tmp_path)


def test_nodes_are_classified_by_what_reaches_them(tmp_path):
    argv = ["train", "graphs-nodes", "--data-dir", str(npz(tmp_path)), "--steps", "30", "--validate-every", "10"]
    argv += ["--device", "cpu", "--no-tensorboard", "--dropout", "0", "--output", str(tmp_path / "run")]
    assert cli.main(argv) == 0
    found = Results.of(Run(tmp_path / "run"))
    assert found.test.figures["accuracy"] == 1
    assert (tmp_path / "run" / "index.html").is_file()
    assert cli.main(["train", "graphs-nodes"]) == 2
