"""Files of ours: whole or not there, with checksums; and what a run says of itself when it is stopped or continued."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("tyro")

import tiny
from rich.console import Console
from tiny import RUNNER, TinyConfig

from torchimplicit import cli
from torchimplicit.recipes import registry
from torchimplicit.recipes.runtime import files
from torchimplicit.recipes.runtime.errors import StorageError, UserError
from torchimplicit.recipes.runtime.execution import as_it_began, go, opened, terminated_like_interrupted
from torchimplicit.recipes.runtime.files import Download, fetch, unchanged
from torchimplicit.recipes.runtime.fitting import loggers, read_checkpoint
from torchimplicit.recipes.runtime.jobs import Job, prepare
from torchimplicit.recipes.runtime.log import rows
from torchimplicit.recipes.runtime.run import Run, RunOptions, create, version
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, Optimization, from_plain, to_plain
from torchimplicit.solvers import Anderson

QUIET = Console(quiet=True)
SHORT = TinyConfig(
    optimization=Optimization(steps=6, batch_size=8, validate_every=2), machine=Machine(device="cpu", tensorboard=False)
)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(registry, "RECIPES", dict(registry.RECIPES))
    monkeypatch.setattr(files, "_said", set())
    tiny.register()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that went to its end; copied by whoever changes it."""
    tiny.register()
    run = create("tiny", RunOptions(output=tmp_path_factory.mktemp("runs") / "run"))
    assert go(RUNNER, SHORT, run, QUIET, begins="tiny") == 0
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it."""
    shutil.copytree(finished.path, tmp_path / "run")
    return Run(tmp_path / "run")


def flipped(content: bytes, seed: int, bits: int = 1) -> bytes:
    drawn = random.Random(seed)
    changed = bytearray(content)
    for _ in range(bits):
        changed[drawn.randrange(len(changed))] ^= 1 << drawn.randrange(8)
    return bytes(changed)


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


def refused(call, *args) -> str:
    """The one line with which it is."""
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@contextmanager
def no_more_than(size: int):
    """No file may grow beyond it meanwhile: a full disk, for one process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


VALUE = {"a": 1.5, "b": [1, "two", None, True], "c": {"d": 1e-300}}


class TestChecksums:
    def test_json_comes_back_however_it_is_laid_out(self, tmp_path):
        path = tmp_path / "value.json"
        files.write_json(path, VALUE)
        assert files.read_json(path) == VALUE
        path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True, indent=None))
        assert files.read_json(path) == VALUE

    @pytest.mark.parametrize("bits", [1, 3])
    @pytest.mark.parametrize("name", ["run.json", "results.json", "checkpoints/last.ckpt", "checkpoints/best.ckpt"])
    def test_no_flipped_bit_gets_through(self, run, name, bits):
        path = run.path / name
        content = path.read_bytes()
        for one in (run.previous, run.best if name.endswith("last.ckpt") else run.previous):
            one.unlink(missing_ok=True)  # to which a damaged last one falls back
        for seed in range(60):
            path.write_bytes(flipped(content, seed, bits))
            read = Run.read if name == "run.json" else lambda run: run.read_json("results.json")
            refused(*(read, run) if name.endswith("json") else (read_checkpoint, path))

    def test_a_file_of_before_is_read_and_its_damage_found_where_it_can_be(self, tmp_path, capsys):
        path = tmp_path / "last.ckpt"
        value = {"state_dict": {"w": torch.arange(300.0)}, "history": {"steps": 3}}
        torch.save(value, path)
        assert same(read_checkpoint(path), value)
        content, accepted = path.read_bytes(), 0
        for seed in range(100):
            path.write_bytes(flipped(content, seed, 2))
            try:
                read = read_checkpoint(path)
            except UserError:
                continue
            accepted += 1
            assert same(read, value)
        assert accepted < 60
        for name in ("one.json", "two.json"):
            (tmp_path / name).write_text('{"a": 1}')
            assert files.read_json(tmp_path / name) == {"a": 1}
        assert capsys.readouterr().err.count("without a checksum") == 1, "it is said once"

    @pytest.mark.parametrize(
        "text",
        ["", "{", "[]", "3", '"text"', "[" * 10**6, '{"a":' * 10**5, '{"a": NaN, "checksum": "sha256:0"}', "\ufeff{}"],
        ids=lambda text: text[:20],
    )
    def test_what_is_no_json_of_ours(self, tmp_path, text):
        (tmp_path / "value.json").write_text(text)
        refused(files.read_json, tmp_path / "value.json")
        (tmp_path / "value.json").write_bytes(b"\xff\xfe" + text.encode("utf-16-le"))
        refused(files.read_json, tmp_path / "value.json")

    def test_what_is_no_checkpoint_of_ours(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "made"),)

        class Large:
            def __reduce__(self):
                return torch.zeros, (10**12,)

        path = tmp_path / "one.ckpt"
        for value in ({"a": Evil()}, {"a": Large()}, torch.ones(3), [1, 2]):
            torch.save(value, path)
            refused(read_checkpoint, path)
        assert not (tmp_path / "made").exists()
        torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
        refused(read_checkpoint, path)
        files.save({"a": torch.ones(3)}, path)
        whole = path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        for content in (b"", whole[:-1], whole[:200], whole + b"x", whole + whole, pickle.dumps(Evil()), b"PK\5\6" * 9):
            path.write_bytes(content)
            refused(read_checkpoint, path)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in parts.items():
                archive.writestr(name, content + b"\0" * 10**6)
        assert "damaged" in refused(read_checkpoint, path)

    def test_a_download_that_is_kept_is_verified(self, tmp_path):
        (tmp_path / "data.zip").write_bytes(b"content")
        kept = Download(name="data.zip", url="http://127.0.0.1:9/", sha256=hashlib.sha256(b"content").hexdigest())
        assert fetch(kept, tmp_path) == tmp_path / "data.zip"
        (tmp_path / "data.zip").write_bytes(b"cOntent")
        assert "delete it" in refused(fetch, kept, tmp_path)

    def test_a_cache_without_published_sums_stays_what_it_was(self, tmp_path):
        for name in ("a.txt", "b.txt"):
            (tmp_path / name).write_text(name)
        unchanged(tmp_path, ["a.txt", "b.txt"])
        unchanged(tmp_path, ["a.txt", "b.txt"])
        sums = (tmp_path / "SHA256SUMS").read_bytes()
        for seed in range(30):
            (tmp_path / "SHA256SUMS").write_bytes(flipped(sums, seed))
            refused(unchanged, tmp_path, ["a.txt", "b.txt"])
        (tmp_path / "SHA256SUMS").write_bytes(sums)
        (tmp_path / "b.txt").write_text("c.txt")
        assert "b.txt has changed" in refused(unchanged, tmp_path, ["a.txt", "b.txt"])


class TestWriting:
    def test_what_was_there_stays_until_the_new_one_is_whole(self, tmp_path):
        path = tmp_path / "text"
        files.write_text(path, "old")

        def half() -> None:
            with files.replacing(path) as draft:
                draft.write_text("half")
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            half()
        assert path.read_text() == "old"
        assert [one.name for one in tmp_path.iterdir()] == ["text"]

    def test_a_full_disk(self, tmp_path):
        path = tmp_path / "last.ckpt"
        files.save({"a": torch.ones(3)}, path)
        files.write_json(tmp_path / "value.json", {"a": "old"})
        with no_more_than(1 << 14):
            with pytest.raises(StorageError, match=r"last\.ckpt cannot be written \(File too large\): make room"):
                files.save({"a": torch.ones(1 << 16)}, path)
            with pytest.raises(StorageError, match=r"value\.json cannot be written"):
                files.write_json(tmp_path / "value.json", {"a": "x" * (1 << 16)})
        assert same(read_checkpoint(path), {"a": torch.ones(3)})
        assert files.read_json(tmp_path / "value.json") == {"a": "old"}
        assert sorted(one.name for one in tmp_path.iterdir()) == ["last.ckpt", "value.json"]

    def test_a_run_notes_a_full_disk(self, tmp_path, monkeypatch):
        run = create("tiny", RunOptions(output=tmp_path / "run"))
        full, write = False, files.write_json

        def only_with_the_reserve(path, value):
            if full and (run.path / ".reserve").exists():
                raise StorageError(errno.ENOSPC, f"{path} cannot be written")
            write(path, value)

        class Fills:
            def train(self, config, run, console):
                nonlocal full
                full = True
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(files, "write_json", only_with_the_reserve)
        with pytest.raises(StorageError, match="resume"):
            go(Fills(), SHORT, run, QUIET, begins="tiny")
        assert run.read()["state"] == "interrupted"
        assert run.read()["reason"] == "the disk is full (No space left on device)"
        assert not (run.path / ".reserve").exists()

    @pytest.mark.parametrize(
        ("number", "said"),
        [
            (signal.SIGHUP, "SIGHUP: the terminal was closed"),
            (signal.SIGTERM, "SIGTERM"),
            (signal.SIGINT, "Ctrl-C"),
        ],
    )
    def test_a_run_notes_what_stopped_it(self, tmp_path, number, said):
        class Stopped:
            def train(self, config, run, console):
                os.kill(os.getpid(), number)
                raise AssertionError("the signal went unheard")

        run = create("tiny", RunOptions(output=tmp_path / "run"))
        # whoever runs the tests may have signals ignored
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        before = signal.signal(number, usual)
        try:
            with terminated_like_interrupted():
                assert go(Stopped(), SHORT, run, QUIET, begins="tiny") == 130
        finally:
            signal.signal(number, before)
        assert (run.read()["state"], run.read()["reason"]) == ("interrupted", said)

    def test_a_hangup_is_ignored_where_it_was(self):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with terminated_like_interrupted():
                os.kill(os.getpid(), signal.SIGHUP)
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_a_run_is_one_process_s(self, run):
        with run.claimed():
            for command in (["resume", str(run.path)], ["train", "tiny", "--output", str(run.path), "--overwrite"]):
                run.mark("interrupted")
                assert cli.main(command) == 2
        assert run.checkpoint.is_file(), "nothing of it was taken away"

    def test_products_outside_of_a_run_are_not_its_own(self, run):
        (run.path.parent / "mine.txt").write_text("mine")
        run.write_json("run.json", {**run.read(), "products": ["../mine.txt"]})
        refused(run.read)
        create("tiny", RunOptions(output=run.path, overwrite=True))
        assert (run.path.parent / "mine.txt").is_file()


class TestGoingOn:
    def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(self, run, capsys):
        losses = [row["loss"] for row in rows(run.metrics) if "loss" in row]
        assert read_checkpoint(run.previous)["history"]["steps"] == 4
        run.checkpoint.write_bytes(flipped(run.checkpoint.read_bytes(), 0))
        assert read_checkpoint(run.checkpoint)["history"]["steps"] == 4
        assert RUNNER.train(SHORT, run, QUIET)
        assert "going on from the one before" in capsys.readouterr().err
        assert [row["loss"] for row in rows(run.metrics) if "loss" in row] == losses
        assert read_checkpoint(run.checkpoint)["history"]["steps"] == 6

    def test_the_run_keeps_its_settings_when_defaults_change(self, run, monkeypatch):
        table = Equilibria.__init__.__kwdefaults__
        monkeypatch.setitem(table, "solver_steps", 3)
        monkeypatch.setitem(table, "tolerance", 0.5)
        assert TinyConfig().equilibria.solver_steps == 3
        assert opened(run.path)[2] == SHORT

    def test_the_run_keeps_the_library_s_defaults(self, run, monkeypatch, capsys):
        seen = []
        evaluate = RUNNER.evaluate

        def watched(config, run, console):
            seen.append(Anderson().memory)
            evaluate(config, run, console)

        monkeypatch.setattr(RUNNER, "evaluate", watched)
        was = Anderson().memory
        monkeypatch.setitem(Anderson.__init__.__kwdefaults__, "memory", 2)
        assert cli.main(["evaluate", str(run.path)]) == 0
        assert seen == [was]
        assert f"Anderson(memory=2); the run keeps its own, {was}" in capsys.readouterr().err
        assert Anderson().memory == 2, "afterwards they are this version's again"

    def test_defaults_that_are_gone_are_told(self, run, capsys):
        run.write_json("run.json", {**run.read(), "defaults": {"Anderson": {"gone": 3}, "Vanished": {"a": [1, 2]}}})
        with as_it_began(run):
            pass
        said = capsys.readouterr().err
        assert "Anderson(gone=3), which this version does not know" in said
        assert "Vanished(a=(1, 2))" in said

    def test_another_version_is_told(self, run, capsys):
        read = run.read()
        assert read["torchimplicit_version"] == version()
        run.write_json("run.json", {**read, "torchimplicit_version": "999.0"})
        assert opened(run.path)[2] == SHORT
        assert "was written by torchimplicit 999.0, and this is" in capsys.readouterr().err
        del read["torchimplicit_version"], read["defaults"]
        run.description.write_text(json.dumps(read))
        assert opened(run.path)[2] == SHORT
        assert "was written by an earlier version" in capsys.readouterr().err

    def test_a_setting_that_the_run_does_not_name_is_told(self, run, capsys):
        read = run.read()
        del read["config"]["equilibria"]["solver_steps"], read["config"]["dropout"]
        run.write_json("run.json", read)
        opened(run.path)
        assert "names no equilibria.solver_steps, dropout" in capsys.readouterr().err

    def test_a_run_that_another_process_has_completed_is_left_alone(self, run):
        with pytest.raises(UserError, match="is complete"):
            go(RUNNER, SHORT, run, QUIET)
        assert run.read()["state"] == "complete"

    def test_settings_that_json_has_no_number_for(self):
        @dataclass(frozen=True)
        class Limits:
            high: float = math.inf
            low: float | None = -math.inf

        globals()["Limits"] = Limits
        assert from_plain(Limits, json.loads(json.dumps(to_plain(Limits(), exact=True)))) == Limits()
        for wrong in (True, "3", "many"):
            with pytest.raises(TypeError):
                from_plain(Limits, {"high": wrong})

    def test_a_table_s_runs_keep_their_settings_too(self, tmp_path, capsys):
        other = replace(SHORT, dropout=0.3)
        first = prepare(Job("one", "tiny", SHORT), tmp_path, "sha256:1")
        assert prepare(Job("one", "tiny", other), tmp_path, "sha256:1").read() == first.read()
        assert "keep the settings of their beginning" in capsys.readouterr().err
        for table in ("sha256:2", ""):
            refused(prepare, Job("one", "tiny", other), tmp_path, table)

    def test_a_log_that_has_lost_steps_is_told(self, run, capsys):
        lines = run.metrics.read_text().splitlines()
        run.metrics.write_text("\n".join([*lines[:2], *lines[5:]]) + "\n")
        loggers(run, 6, tensorboard=False)
        assert "of the 6 steps that were done" in capsys.readouterr().err
        run.metrics.write_text("\n".join(lines).replace(".", "x"))
        assert "damaged" in refused(rows, run.metrics)

    def test_a_run_of_before_resumes(self, run):
        config = replace(SHORT, optimization=replace(SHORT.optimization, steps=8))
        plain = {"recipe": "tiny", "state": "interrupted", "config": to_plain(config)}
        run.description.write_text(json.dumps(plain))
        torch.save(read_checkpoint(run.checkpoint), run.checkpoint)
        assert cli.main(["resume", str(run.path)]) == 0
        assert read_checkpoint(run.checkpoint)["history"]["steps"] == 8
