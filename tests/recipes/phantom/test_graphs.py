"""The graph recipes and their table, on made-up graphs: no download, and no more than a few steps."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("lightning")
pytest.importorskip("tyro")
pytest.importorskip("torch_geometric")

import torch
from rich.console import Console

from torchimplicit import cli
from torchimplicit.recipes import registry
from torchimplicit.recipes.phantom import graphs as runner
from torchimplicit.recipes.phantom import graphs_table as table_jobs
from torchimplicit.recipes.phantom.graphs import RUNNER as TRAINER
from torchimplicit.recipes.phantom.graphs import ChainsConfig, MoleculesConfig, chains, cox2, ppi, proteins
from torchimplicit.recipes.phantom.graphs_table import TABLE, PhantomGraphsConfig
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.run import Run, RunOptions, create
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, Optimization, to_plain
from torchimplicit.recipes.runtime.task import Shard
from torchimplicit.recipes.runtime.trainer import Results


def write_tu(folder, name, graphs=24):
    """Paths and triangles, by class, the third node of every fourth graph isolated, and one graph without any edge."""
    folder.mkdir(parents=True, exist_ok=True)
    edges, owner, node_labels, labels, first = [], [], [], [], 1
    for graph in range(graphs):
        kind = graph % 2
        links = [(0, 1), (1, 2)] + ([(2, 0)] if kind else [])
        if graph % 4 == 3:
            links = [(0, 1)]
        if graph == 5:
            links = []
        for a, b in links:
            edges += [f"{first + a}, {first + b}", f"{first + b}, {first + a}"]
        owner += [str(graph + 1)] * 3
        node_labels += [str(kind), "0", "1"]
        labels.append(str(2 * kind - 1))
        first += 3
    for part, lines in (
        ("A", edges),
        ("graph_indicator", owner),
        ("graph_labels", labels),
        ("node_labels", node_labels),
    ):
        (folder / f"{name}_{part}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    path = tmp_path_factory.mktemp("tu")
    for name in ("COX2", "PROTEINS"):
        write_tu(path / name, name)
    return path


@pytest.fixture
def proteins_of_tissues(tmp_path):
    """Three graphs a split: of four, one and two nodes; the one node is isolated, and the last graph has no edge."""
    rng = np.random.default_rng(0)
    for split in ("train", "valid", "test"):
        graph = {"links": [{"source": a, "target": b} for a, b in ((0, 1), (1, 2), (2, 2), (2, 3))]}
        (tmp_path / f"{split}_graph.json").write_text(json.dumps(graph), encoding="utf-8")
        np.save(tmp_path / f"{split}_feats.npy", rng.normal(size=(7, 50)))
        np.save(tmp_path / f"{split}_labels.npy", rng.integers(2, size=(7, 121)))
        np.save(tmp_path / f"{split}_graph_id.npy", np.array([3, 3, 3, 3, 4, 5, 5]))
    return tmp_path


def results(path):
    return Results.of(Run(path))


SHORT = ["--steps", "2", "--validate-every", "1", "--device", "cpu", "--no-tensorboard"]


@pytest.mark.parametrize("recipe", ["graphs-cox2", "graphs-proteins"])
@pytest.mark.parametrize("gradient", ["implicit", "unrolled-phantom"])
def test_a_fold_is_trained(collection, tmp_path, recipe, gradient):
    argv = ["train", recipe, *SHORT, "--milestones", "--schedule", "cosine", "--data-dir", str(collection)]
    argv += ["--batch-size", "8", "--folds", "4", "--fold", "2", "--gradient", gradient, "--width", "8", "--peek"]
    assert cli.main([*argv, "--output", str(tmp_path / "run")]) == 0
    found = results(tmp_path / "run")
    assert found.state == "complete"
    assert found.test is not None
    assert set(found.test.figures) == {"accuracy", "loss"}
    assert {"accuracy", "loss", "test_accuracy"} == set(found.validations[0].figures)
    assert found.costs is not None
    assert found.costs.backward > 0


def test_every_fold_is_trained_and_told(tmp_path, capsys):
    write_tu(tmp_path / "set", "OWN")
    argv = ["train", "graphs-folds", *SHORT, "--data-dir", str(tmp_path / "set"), "--folds", "3", "--width", "4"]
    assert cli.main([*argv, "--peek", "--output", str(tmp_path / "run")]) == 0
    assert "mean" in capsys.readouterr().out
    found = Run(tmp_path / "run").read_json("folds.json")["folds"]
    assert [one["fold"] for one in found] == [0, 1, 2]
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 0
    assert cli.main(["report", str(tmp_path / "run" / "fold-0"), "--page", str(tmp_path / "report.html")]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_what_is_peeked_at_is_the_test_part_and_changes_nothing(collection, tmp_path):
    config = quick(collection, steps=3)
    found = [trained(tmp_path / str(peek), "graphs-cox2", replace(config, peek=peek)) for peek in (False, True)]
    blind, peeked = map(Results.of, found)
    assert peeked.test == replace(blind.test, seconds=peeked.test.seconds)
    assert peeked.best.step == blind.best.step
    at_best = next(v for v in peeked.validations if v.step == peeked.best.step)
    assert at_best.figures["test_accuracy"] == pytest.approx(peeked.test.figures["accuracy"])


def quick(collection, steps=2, **changes):
    return replace(
        MoleculesConfig(
            optimization=Optimization(steps=steps, batch_size=8, validate_every=1),
            machine=Machine(device="cpu", tensorboard=False),
        ),
        data_dir=collection,
        folds=4,
        width=8,
        **changes,
    )


def trained(path, recipe, config):
    run = create(recipe, RunOptions(output=path))
    run.describe(recipe, config)
    assert TRAINER.train(config, run, Console(quiet=True))
    return run


def test_a_step_is_a_function_of_the_seed_and_the_step(collection):
    task = runner.build(quick(collection))
    (late,) = task.training_batches(range(5, 6), Shard())
    *_, again = task.training_batches(range(6), Shard())
    assert torch.equal(late.x, again.x)
    assert torch.equal(late.edge_index, again.edge_index)


def test_ppi_is_trained(proteins_of_tissues, tmp_path):
    argv = ["train", "graphs-ppi", *SHORT, "--data-dir", str(proteins_of_tissues), "--widths", "8", "6"]
    assert cli.main([*argv, "--output", str(tmp_path / "run")]) == 0
    found = results(tmp_path / "run")
    assert found.test is not None
    assert 0 <= found.test.figures["f1"] <= 1


def test_the_f1_is_that_of_scikit_learn(proteins_of_tissues):
    from sklearn.metrics import f1_score

    task = runner.build(replace(ppi(), data_dir=proteins_of_tissues, widths=(8,))).eval()
    (batch, *rest) = task.held_out_batches("test", Shard())
    sums = task.score(batch)
    with torch.no_grad():
        said = task.model(batch.x, batch.edge_index) > 0
    expected = f1_score(batch.y.numpy(), said.numpy(), average="micro")
    assert task.figures(sums.tolist())["f1"] == pytest.approx(expected)
    assert rest


def test_chains_are_learned_from_the_identity_like_start(tmp_path):
    argv = ["train", "graphs-chains", "--length", "30", "--steps", "8", "--validate-every", "4", "--no-tensorboard"]
    assert cli.main([*argv, "--output", str(tmp_path / "run")]) == 0
    found = results(tmp_path / "run")
    assert found.test is not None
    assert found.test.figures["accuracy"] >= 0.95
    assert found.test.unconverged == 0


def test_a_node_that_nothing_reaches_counts_as_half_right():
    loose = Equilibria(solver="fixed-point", tolerance=0.5)
    task = runner.build(replace(chains(), length=20, equilibria=loose)).eval()
    (batch,) = task.held_out_batches("test", Shard())
    sums = task.score(batch).tolist()
    scores, _ = task._scores(batch)
    tied = int((scores[:, 0] == scores[:, 1]).sum())
    assert tied > 0
    assert sums[0] >= tied / 2


def test_the_published_settings():
    assert (cox2().optimization.steps, cox2().optimization.milestones) == (600, (150,))
    assert (proteins().optimization.steps, proteins().optimization.milestones) == (1600, (400,))
    assert (ppi().kappa, ppi().optimization.learning_rate) == (0.98, 0.005)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["graphs-cox2", "--data-dir", "nowhere"], "nowhere is not a folder"),
        (["graphs-ppi", "--data-dir", "."], "holds no train_graph.json"),
        (["graphs-proteins", "--data-dir", "."], "holds no PROTEINS_A.txt"),
        (["graphs-cox2", "--fold", "10"], "--fold 10 must lie below --folds 10"),
        (["graphs-cox2", "--kappa", "1"], "--kappa must lie between 0 and 1"),
        (["graphs-chains", "--length", "5"], "at least 8"),
        (["graphs-chains", "--precision", "bf16-mixed"], "double precision"),
        (["graphs-chains", "--devices", "2"], "--devices"),
        (["graphs-ppi", "--widths", "0"], "--widths must be positive"),
    ],
)
def test_bad_settings_are_said_in_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_without_torch_geometric_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(runner, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'torchimplicit\[graphs\]'"):
        TRAINER.check(chains())


# the table


@pytest.fixture(scope="module")
def small(collection, tmp_path_factory):
    """The table on made-up graphs, two steps a run, in this process."""
    path = tmp_path_factory.mktemp("table")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            table_jobs,
            "QUICK",
            {
                name: Optimization(steps=2, batch_size=8, validate_every=1, learning_rate=0.01)
                for name in ("COX2", "PROTEINS")
            },
        )
        config = default_of(collection)
        runs = {}
        for job in table_jobs.jobs(config):
            settings = job.config
            if isinstance(settings, ChainsConfig):
                settings = replace(settings, optimization=replace(settings.optimization, steps=2))
            run = create(job.recipe, RunOptions(output=path / job.name))
            run.describe(job.recipe, settings)
            assert registry.runner(job.recipe).train(settings, run, Console(quiet=True))
            runs[job.name] = run
    return config, runs


def default_of(collection):
    return replace(
        registry.settings("phantom-graphs"), data_dir=collection, folds=2, lengths=(8, 10), dampings=(0.5, 1.0)
    )


def test_the_table_sets_the_published_figures_beside_ours(small):
    config, runs = small
    summary = TABLE.summarize(config, runs)
    accuracy, cost, lengths = (sheet.table for sheet in summary.sheets)
    by_row = {row[0]: row for row in accuracy.rows}
    assert by_row["COX2: implicit"][3] == "84.1 ± 2.9"
    assert by_row["PROTEINS: UPG, λ = 1"][3] == "78.8 ± 4.2"
    assert by_row["COX2: constant answer"][1] == "78.2"
    assert all("±" in by_row[f"{name}: implicit"][1] for name in ("COX2", "PROTEINS"))
    assert all(row[5] != "–" for row in cost.rows)
    assert [column.title for column in lengths.columns] == ["Initial W", "8 nodes", "10 nodes", "Seeds"]
    assert len(summary.drawings) == 2
    assert any("chains of 10 nodes" in claim.statement for claim in summary.claims)
    assert summary.runs.keys() == set(runs)
    json.dumps(to_plain(summary.runs), allow_nan=False)


@pytest.mark.parametrize("kept", ["", "cox2-fold0-implicit", "cox2-fold1-upg-1", "chains-8-loose-0", "cost-cox2"])
def test_the_table_makes_do_with_some_runs(small, kept):
    config, runs = small
    some = {name: run for name, run in runs.items() if name == kept}
    summary = TABLE.summarize(config, some)
    assert len(summary.sheets) == 3
    assert any("are not done, or diverged" in note for note in summary.notes)
    assert all(isinstance(claim.holds, bool) for claim in summary.claims)


def test_a_run_that_diverged_is_named(small, tmp_path):
    config, runs = small
    name = "cox2-fold0-implicit"
    broken = create("graphs-cox2", RunOptions(output=tmp_path / name))
    plain = runs[name].read_json("results.json")
    broken.write_json("results.json", {**plain, "state": "diverged", "test": None})
    summary = TABLE.summarize(config, {**runs, name: broken})
    assert name not in summary.runs
    assert any(name in note for note in summary.notes)


def test_the_passes_are_the_users_choice(collection):
    (fold,) = [
        job
        for job in table_jobs.jobs(PhantomGraphsConfig(data_dir=collection, sets=("COX2",), folds=2, passes=3))
        if job.name == "cox2-fold0-implicit"
    ]
    assert fold.config.optimization.steps == 3 * fold.config.optimization.validate_every


def test_wrong_settings_of_the_table():
    for changes, message in (
        ({"folds": 1}, "--folds"),
        ({"dampings": (0.0,)}, "--dampings"),
        ({"lengths": (0,)}, "--lengths"),
    ):
        with pytest.raises(UserError, match=message):
            PhantomGraphsConfig(**changes)


def test_edges_weigh_one_or_their_label_or_as_in_the_published_code(tmp_path):
    write_tu(tmp_path, "MUTAG")
    edges = len((tmp_path / "MUTAG_A.txt").read_text(encoding="utf-8").splitlines())
    (tmp_path / "MUTAG_edge_labels.txt").write_text("3\n" * edges, encoding="utf-8")

    def weights(kind, training):
        task = runner.MoleculesTask(replace(cox2(), data="MUTAG", data_dir=tmp_path, folds=2, edge_weights=kind))
        (batch,) = task.train(training).training_batches(range(1), Shard())
        found = task._edge_weights(batch)
        return None if found is None else set(found.tolist())

    assert weights("ones", training=True) is None
    assert weights("labels", training=True) == weights("labels", training=False) == {3.0}
    assert weights("as-published", training=True) == {3.0}
    assert weights("as-published", training=False) == {2.0}
