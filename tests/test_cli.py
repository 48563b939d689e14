"""The command line: help, names, and what is said when something is wrong."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from torchimplicit import cli, recipes

pytest.importorskip("lightning")
pytest.importorskip("tyro")

COMMANDS = (
    "demo", "list", "molecules", "density", "pretrain", "finetune", "train", "reproduce", "resume", "evaluate", "report"
)  # fmt: skip


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


def run(capsys, *argv):
    code = cli.main(argv)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def fails(capsys, *argv):
    """The one line that a command with bad input prints."""
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert out == ""
    assert err.startswith("torchimplicit: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_help_names_every_command(capsys, argv):
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize("argv", [["demo"], ["train", "digits"]])
def test_help_shows_what_each_setting_means(capsys, argv):
    code, out, _ = run(capsys, *argv, "--help")
    assert code == 0
    for setting in ("--estimators", "--epochs", "--max-steps", "--seed", "--device", "--output", "--overwrite"):
        assert setting in out
    assert "Passes over the training split" in out


def test_help_names_shared_options_and_help_all_explains_them(capsys):
    short, whole = (run(capsys, "train", "images-digits", flag)[1] for flag in ("--help", "--help-all"))
    for shown in (short, whole):
        assert all(option in shown for option in ("--data-dir", "--learning-rate", "--monitor-every", "--overwrite"))
    assert "Data set." in short
    assert "--help-all" in short
    assert "Peak learning rate" in whole
    assert "Peak learning rate" not in short
    assert short.count("\n") < whole.count("\n") / 2


def test_help_for_every_option_is_a_sentence():
    """No fragment that only makes sense beside the option's name, such as "Of the state."."""
    fragment = re.compile(r"(Of|By|At|Which|Whether|Likewise|The same|The most)\b")
    for path in Path(recipes.__file__).parent.rglob("*.py"):
        for owner in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for before, after in pairwise(owner.body if isinstance(owner, ast.ClassDef) else []):
                if isinstance(before, ast.AnnAssign) and isinstance(after, ast.Expr):
                    said = ast.literal_eval(after.value)
                    assert not fragment.match(said), f"{path}:{after.lineno}: {said}"


def test_the_demo_has_its_own_defaults(capsys):
    assert "default: implicit unrolled-phantom neumann-phantom" in " ".join(run(capsys, "demo", "--help")[1].split())


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "demo"])
def test_every_command_has_help(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"torchimplicit {command}" in out


@pytest.mark.parametrize(("command", "default"), [("report", "report.html"), ("molecules", "lda,pw")])
def test_settings_with_a_default_can_be_left_out(capsys, command, default):
    shown = run(capsys, command, "--help-all")[1]
    assert f"(default: {default})" in " ".join(shown.split())
    assert "(required)" not in shown


def test_version(capsys):
    code, out, _ = run(capsys, "--version")
    assert code == 0
    assert out.strip()[0].isdigit()


def test_list_has_a_line_for_every_recipe(capsys):
    from torchimplicit.recipes.registry import RECIPES, TABLES

    code, out, _ = run(capsys, "list")
    assert code == 0
    for name in {**RECIPES, **TABLES}:
        assert any(line.split()[:1] == [name] for line in out.splitlines())


def test_the_list_as_json(capsys):
    from torchimplicit.recipes.registry import RECIPES, TABLES

    listed = json.loads(run(capsys, "list", "--json")[1])
    assert [one["name"] for one in listed] == [*RECIPES, *TABLES]
    assert all(one["command"] in COMMANDS and one["summary"] for one in listed)


def test_unknown_names_are_refused_in_one_line(capsys):
    assert "no command 'trane'" in fails(capsys, "trane")
    assert "did you mean 'train'?" in fails(capsys, "trane")
    assert "did you mean 'implicit'?" in fails(capsys, "demo", "--estimators", "implict")
    assert "no recipe 'foo'; 'torchimplicit list' shows all recipes" in fails(capsys, "train", "foo")
    assert "no recipe 'digit'; did you mean 'digits'?" in fails(capsys, "train", "digit")
    assert "no option --step; did you mean '--steps'?" in fails(capsys, "train", "images-digits", "--step", "3")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["train"], "needs the name of a recipe"),
        (["resume"], "RUN"),
        (["demo", "--nonsense", "3"], "--nonsense"),
        (["demo", "--seed", "x"], "--seed"),
        (["demo", "--estimators", "magic"], "'magic'"),
        (["demo", "--estimators"], "at least one estimator"),
        (["demo", "--channels", "7"], "multiple of 4"),
        (["demo", "--epochs", "0"], "--epochs must be positive"),
        (["demo", "--phantom-damping", "1.5"], "--phantom-damping must lie in (0, 1]"),
        (["demo", "--learning-rate", "nan"], "--learning-rate must be positive"),
        (["evaluate", "nowhere"], "nowhere is not a directory"),
        (["resume", "."], "holds no run"),
    ],
)
def test_bad_input_is_told_in_one_line(capsys, argv, said):
    assert said in fails(capsys, *argv)


def test_a_gpu_that_is_not_there(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "--device cpu" in fails(capsys, "demo", "--device", "cuda")
    assert not list(tmp_path.iterdir())


def test_more_processes_than_cores(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert "2 CPU cores" in fails(capsys, "train", "images-digits", "--device", "cpu", "--devices", "9")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_silently(capsys, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    assert "not empty" in fails(capsys, "demo", "--output", "folder")
    assert "no earlier run" in fails(capsys, "demo", "--output", "folder", "--overwrite")
    assert "is a file" in fails(capsys, "demo", "--output", "folder/mine.txt")
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"recipe": "digits", "state": "complete"}', '{"recipe": 3, "state": "complete", "config": {}}']
)
def test_a_broken_run_is_told_apart(capsys, tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    assert "cannot be read" in fails(capsys, "evaluate", ".")


@pytest.mark.parametrize("config", [{"epochs": "many"}, {"unheard_of": 1}, {"estimators": ["magic"]}])
def test_settings_of_another_version_are_told_apart(capsys, tmp_path, config):
    (tmp_path / "run.json").write_text(json.dumps({"recipe": "digits", "state": "complete", "config": config}))
    assert "does not fit recipe 'digits'" in fails(capsys, "evaluate", ".")


def test_a_missing_extra_is_told_in_one_line(capsys, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("tyro", "sklearn") else there(name))
    code, out, err = run(capsys, "demo")
    assert (code, out) == (1, "")
    assert "tyro, scikit-learn" in err
    assert "pip install 'torchimplicit[recipes]'" in err
    assert err.count("\n") == 1


def test_every_recipe_can_be_loaded_and_stored():
    from torchimplicit.recipes.registry import RECIPES, TABLES, settings
    from torchimplicit.recipes.runtime.settings import from_plain, to_plain

    for name in {**RECIPES, **TABLES}:
        config = settings(name)
        assert from_plain(type(config), json.loads(json.dumps(to_plain(config)))) == config
