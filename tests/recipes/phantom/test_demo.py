"""The digits recipe and the demo, end to end and small."""

from __future__ import annotations

import csv
import json
import os
import signal
from html.parser import HTMLParser

import pytest
import torch

pytest.importorskip("lightning")

from torchimplicit import cli
from torchimplicit.recipes.phantom import demo_task as data
from torchimplicit.recipes.phantom.demo_task import DigitsTask

SMALL = ["--channels", "4", "--batch-size", "256", "--solver-steps", "12"]
"""Five steps an epoch, a fraction of a second each."""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(path):
    """JSON as strict as the standard."""

    def refuse(constant):
        raise AssertionError(f"{path} holds {constant}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def losses(path, name="implicit"):
    return [step["loss"] for step in read(path / "results.json")["estimators"][name]["track"]["steps"]]


class Page(HTMLParser):
    """Checks that the elements nest, and collects what they refer to and what they say."""

    VOID = ("meta", "br", "img", "hr", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.ids = [], [], [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo of four steps with an audit at every third."""
    path = tmp_path_factory.mktemp("demo") / "run"
    short = ["--max-steps", "4", "--audit-every", "3", "--tolerance", "1e-4", "--solver-steps", "30"]
    assert cli.main(["demo", *SMALL, *short, "--output", str(path)]) == 0
    return path


def test_the_demo_writes_strict_json(demo):
    results = read(demo / "results.json")
    assert results["state"] == "complete"
    assert results["planned_steps"] == 4
    assert list(results["estimators"]) == ["implicit", "unrolled-phantom", "neumann-phantom"]
    for found in results["estimators"].values():
        assert len(found["track"]["steps"]) == 4
        assert [audit["step"] for audit in found["track"]["audits"]] == [0, 3]
        assert found["track"]["validations"][-1]["step"] == 4
        assert all(value is not None for value in found["summary"].values())
        assert [profile["solver"] for profile in found["profiles"]] == ["Anderson", "plain iteration"]
        assert all(profile["median"][-1] < profile["median"][0] for profile in found["profiles"])
    assert read(demo / "run.json")["state"] == "complete"


def test_the_demo_is_fair(demo):
    """All start from the same weights and the same batch."""
    found = read(demo / "results.json")["estimators"]
    first = [estimator["track"]["steps"][0]["loss"] for estimator in found.values()]
    # the unrolled phantom returns the state a few steps on from the solution
    assert first[2] == first[0]
    assert first[1] == pytest.approx(first[0], rel=1e-3)


def test_the_exact_gradient_is_seen_to_be_exact(demo):
    found = read(demo / "results.json")["estimators"]
    exact, *phantoms = (estimator["summary"] for estimator in found.values())
    assert exact["cosine"] > 0.999
    for phantom in phantoms:
        assert phantom["cosine"] < exact["cosine"]
        assert phantom["adjoint_residual"] > 10 * exact["adjoint_residual"]


def test_evaluations_are_counted(demo):
    found = read(demo / "results.json")["estimators"]
    assert found["unrolled-phantom"]["summary"]["backward_evaluations"] == 4
    assert found["neumann-phantom"]["summary"]["backward_evaluations"] == 4
    assert found["implicit"]["summary"]["backward_evaluations"] > 0


def test_the_page_stands_alone(demo):
    text = (demo / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "http" not in text
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    referred = [value for name, value in page.attributes if name in ("src", "href")]
    assert all(value.startswith("#") for value in referred)
    assert {value[1:] for value in referred} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") == 4
    assert "interrupted" not in page.text


def test_the_page_tells_what_was_done(demo):
    page = Page((demo / "index.html").read_text(encoding="utf-8"))
    for said in ("three gradients", "Validation accuracy", "Cosine to exact", "--learning-rate", "Passes over"):
        assert said in page.text
    assert page.tags.count("figcaption") == 4


def test_the_pictures_are_written(demo):
    pictures = sorted((demo / "figures").iterdir())
    assert [picture.stem for picture in pictures] == [
        "cosine-against-step",
        "loss-against-time",
        "residual-against-iteration",
        "spectral-radius-against-step",
    ]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_the_log_has_a_row_for_every_step(demo):
    with (demo / "logs" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    assert [float(row["implicit/loss"]) for row in rows] == losses(demo)


def interrupt_at(monkeypatch, call, how):
    """Interrupt within the optimizer step number ``call``."""
    step = DigitsTask._timed_step
    calls = []

    def interrupted(self, *args):
        calls.append(None)
        if len(calls) == call:
            how()
        return step(self, *args)

    monkeypatch.setattr(DigitsTask, "_timed_step", interrupted)


def raise_interrupt():
    raise KeyboardInterrupt


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("how", [raise_interrupt, press_ctrl_c, terminate])
def test_an_interrupt_leaves_what_was_done(capsys, monkeypatch, tmp_path, how):
    interrupt_at(monkeypatch, 8, how)
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in signals]
    assert cli.main(["demo", *SMALL, "--epochs", "1", "--output", "run"]) == 130
    assert [signal.getsignal(number) for number in signals] == before
    run = tmp_path / "run"
    assert "torchimplicit resume run" in capsys.readouterr().out
    assert read(run / "run.json")["state"] == "interrupted"
    results = read(run / "results.json")
    assert results["state"] == "interrupted"
    # the eighth step of all is the second estimator's third; a signal lets the three finish it
    done = sum(len(found["track"]["steps"]) for found in results["estimators"].values())
    assert done == (7 if how is raise_interrupt else 9)
    assert "This run was interrupted" in Page((run / "index.html").read_text(encoding="utf-8")).text


def test_an_interrupt_before_the_first_step_is_clean(monkeypatch, tmp_path):
    interrupt_at(monkeypatch, 1, raise_interrupt)
    assert cli.main(["train", "digits", *SMALL, "--epochs", "1", "--output", "run"]) == 130
    assert read(tmp_path / "run" / "results.json")["estimators"]["implicit"]["summary"]["training_loss"] is None
    Page((tmp_path / "run" / "index.html").read_text(encoding="utf-8"))


def test_a_resumed_run_is_the_uninterrupted_one(capsys, monkeypatch, tmp_path):
    argv = ["train", "digits", *SMALL, "--epochs", "3", "--seed", "1"]
    assert cli.main([*argv, "--output", "whole"]) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 8, press_ctrl_c)
        assert cli.main([*argv, "--output", "parts"]) == 130
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert losses(parts) == losses(whole)[:8]
    assert cli.main(["resume", "parts"]) == 0
    assert len(losses(whole)) == 15
    assert losses(parts) == losses(whole)
    weights = [torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (whole, parts)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    with (parts / "logs" / "metrics.csv").open(newline="") as file:
        assert [float(row["implicit/loss"]) for row in csv.DictReader(file)] == losses(whole)
    capsys.readouterr()
    assert cli.main(["resume", "parts"]) == 2
    assert "is complete" in capsys.readouterr().err

    accuracy = read(whole / "results.json")["estimators"]["implicit"]["summary"]["validation_accuracy"]
    assert cli.main(["evaluate", "whole"]) == 0
    assert read(whole / "evaluation.json")["estimators"]["implicit"]["accuracy"] == accuracy
    assert f"{100 * accuracy:.1f}" in capsys.readouterr().out


def test_a_checkpoint_of_other_settings_is_told_apart(capsys, monkeypatch, tmp_path):
    argv = ["train", "digits", *SMALL, "--epochs", "2", "--output", "run"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7, press_ctrl_c)
        assert cli.main(argv) == 130
    description = read(tmp_path / "run" / "run.json")
    description["config"]["channels"] = 8
    (tmp_path / "run" / "run.json").write_text(json.dumps(description))
    capsys.readouterr()
    assert cli.main(["resume", "run"]) == 2
    assert 'take its line "checksum" out' in capsys.readouterr().err
    del description["checksum"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(description))
    for command in ("resume", "evaluate"):
        assert cli.main([command, "run"]) == 2
        assert "does not fit" in capsys.readouterr().err


def test_there_is_nothing_to_evaluate_before_the_first_epoch(capsys, monkeypatch):
    interrupt_at(monkeypatch, 2, press_ctrl_c)
    assert cli.main(["train", "digits", *SMALL, "--epochs", "1", "--output", "run"]) == 130
    capsys.readouterr()
    assert cli.main(["evaluate", "run"]) == 2
    assert "before its first epoch" in capsys.readouterr().err


def test_the_split_is_honest():
    training, validation = data.load(3)
    assert (len(training.labels), len(validation.labels)) == (1437, 360)
    assert len(torch.unique(torch.cat([training.labels, validation.labels]))) == 10
    again, _ = data.load(3)
    other, _ = data.load(4)
    assert torch.equal(training.images, again.images)
    assert not torch.equal(training.images, other.images)
    share = torch.bincount(validation.labels) / (torch.bincount(validation.labels) + torch.bincount(training.labels))
    assert float((share - 0.2).abs().max()) < 0.01


def test_batches_depend_on_seed_and_epoch_alone():
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 1)):
        shuffle = data.EpochShuffle(50, seed)
        shuffle.set_epoch(epoch)
        orders.append(list(shuffle))
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[1] == orders[3]
    assert orders[0] != orders[1] != orders[2] != orders[0]
