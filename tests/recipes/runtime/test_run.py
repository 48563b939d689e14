"""Run directories, and values on their way to JSON and back."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("lightning")

from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.run import Run, RunOptions, create, of_run
from torchimplicit.recipes.runtime.settings import from_plain, to_plain


@dataclass(frozen=True)
class Inner:
    values: list[float]


@dataclass(frozen=True)
class Outer:
    inner: dict[str, Inner]
    names: tuple[str, ...]
    limit: int | None


def test_plain_values_come_back():
    value = Outer({"a": Inner([1.0, 2.5])}, ("x", "y"), None)
    assert from_plain(Outer, json.loads(json.dumps(to_plain(value)))) == value


def test_numbers_that_json_does_not_know_become_null():
    assert to_plain([math.inf, math.nan, 1.0]) == [None, None, 1.0]
    assert math.isnan(from_plain(Inner, {"values": [None]}).values[0])


@pytest.mark.parametrize(("names", "limit"), [([1], None), ([], True)])
def test_values_of_the_wrong_kind_are_refused(names, limit):
    with pytest.raises(TypeError):
        from_plain(Outer, {"inner": {}, "names": names, "limit": limit})


def test_runs_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [create("digits", RunOptions()).path for _ in range(2)] == [Path("runs/digits/001"), Path("runs/digits/002")]
    (tmp_path / "runs/digits/017").mkdir()
    (tmp_path / "runs/digits/notes").mkdir()
    assert create("digits", RunOptions()).path.name == "018"


def test_overwriting_replaces_a_run_and_nothing_else(tmp_path):
    path = tmp_path / "here"
    run = create("digits", RunOptions(output=path))
    run.describe("digits", {})
    run.checkpoint.write_text("old")
    (path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        create("digits", RunOptions(output=path))
    again = create("digits", RunOptions(output=path, overwrite=True))
    assert not again.checkpoint.exists()
    assert not again.description.exists()
    assert (path / "notes.txt").read_text() == "mine"


def test_two_processes_do_not_train_into_one_run(tmp_path):
    run = Run(tmp_path)
    with run.claimed(), pytest.raises(UserError, match="another process"), Run(tmp_path).claimed():
        pass
    with run.claimed():
        pass


def test_a_run_knows_its_state(tmp_path):
    run = Run(tmp_path)
    run.describe("digits", {"epochs": 3})
    run.mark("interrupted", "SIGTERM")
    wanted = {"recipe": "digits", "state": "interrupted", "reason": "SIGTERM", "config": {"epochs": 3}}
    assert run.read().items() >= wanted.items()
    run.mark("running")
    assert "reason" not in run.read()


def test_products_are_replaced_with_their_run_and_a_broken_run_can_be(tmp_path) -> None:
    run = create("digits", RunOptions(output=tmp_path / "run"))
    run.describe("digits", {})
    run.product("sound.wav").write_text("mine")
    (run.path / "notes.wav").write_text("the user's")
    create("digits", RunOptions(output=run.path, overwrite=True)).describe("digits", {})
    assert not (run.path / "sound.wav").exists()
    assert (run.path / "notes.wav").exists()
    run.description.write_text("{")
    create("digits", RunOptions(output=run.path, overwrite=True)).describe("digits", {})
    assert run.read()["recipe"] == "digits"


def test_defaults_that_a_strategy_refuses_are_told_in_a_line():
    from torchimplicit import Anderson

    before = Anderson().memory
    with (
        pytest.raises(UserError, match=r"changed by hand: Anderson\.memory is -4"),
        of_run({"Anderson": {"memory": -4}}),
    ):
        pass
    assert Anderson().memory == before
    with of_run({"Anderson": {"memory": 3}}):
        assert Anderson().memory == 3
