"""``torchimplicit molecules``, with calculations that are made up."""

from __future__ import annotations

import pytest

pytest.importorskip("lightning")
pytest.importorskip("tyro")

from torchimplicit import cli

WATER = "3\nwater\nO 0 0 0\nH 0.7572 0.5865 0\nH -0.7572 0.5865 0\n"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(capsys, *argv):
    code = cli.main(["molecules", *argv])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_names_and_distorted_copies(capsys, tmp_path, no_chemistry):
    code, out, _ = run(
        capsys, "H2O", "H2", "H2O", "--output", "here", "--distort", "0.04", "--copies", "2", "--grid", "0"
    )
    assert code == 0
    assert sorted(no_chemistry) == sorted(["H2O", "H2", "H2O-d1", "H2O-d2", "H2-d1", "H2-d2"])
    assert "6 of 6 molecules in here" in out
    assert "6 computed" in out
    assert len(list((tmp_path / "here").iterdir())) == 6
    code, out, _ = run(capsys, "H2O", "H2", "--output", "here", "--distort", "0.04", "--copies", "2", "--grid", "0")
    assert (code, len(no_chemistry)) == (0, 6)
    assert "0 computed" in out
    assert "6 were there" in out


def test_the_cache_is_the_default(capsys, tmp_path, no_chemistry):
    assert run(capsys, "H2")[0] == 0
    assert len(list((tmp_path / "cache" / "torchimplicit" / "molecules").iterdir())) == 1


def test_failures_are_listed_and_told_by_the_exit_code(capsys, tmp_path, no_chemistry):
    (tmp_path / "set").mkdir()
    for name, text in {"bad": WATER, "fine": WATER, "odd": "1\n\nH 0 0 0\n"}.items():
        (tmp_path / "set" / f"{name}.xyz").write_text(text)
    code, out, _ = run(capsys, "set", "--output", "here")
    assert code == 1
    assert "1 of 3 molecules in here" in out
    assert "2 failed" in out
    table = out[out.index("not computed") :]
    assert "bad" in table
    assert "it does not converge" in table
    assert "open shell" in " ".join(table.replace("│", " ").split())


def test_the_smallest_and_the_first(capsys, tmp_path, no_chemistry):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.xyz").write_text(WATER)
    (tmp_path / "set" / "b.xyz").write_text("2\n\nH 0 0 0\nH 0 0 .74\n")
    run(capsys, "set", "--output", "here", "--limit", "1")
    run(capsys, "set", "--output", "here", "--limit", "1", "--smallest")
    assert no_chemistry == ["a", "b"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "molecules needs at least one source"),
        (["unheard-of"], "there is no molecule or file 'unheard-of'"),
        (["H2", "--copies", "2"], "--copies and --distort go together"),
        (["H2", "--distort", "0.1"], "--copies and --distort go together"),
        (["H2", "--distort", "-1"], "--distort must not be negative"),
        (["H2", "--workers", "0"], "--workers must be positive"),
        (["H2", "--limit", "0"], "--limit must be positive"),
        (["H2", "--grid", "12"], "--grid must lie in 0 to 9"),
        (["H2", "--charge", "1"], "open shell"),
        (["H2", "--electrons", "4"], "and 4 were asked for"),
        (["H2", "--output", "file"], "file is a file"),
    ],
)
def test_bad_input_is_told_in_one_line(capsys, tmp_path, no_chemistry, argv, said):
    (tmp_path / "file").write_text("")
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert no_chemistry == []


def test_large_molecules_need_the_flag(capsys, tmp_path, no_chemistry):
    (tmp_path / "long.xyz").write_text("60\n\n" + "".join(f"He 0 0 {3 * i}\n" for i in range(60)))
    code, _, err = run(capsys, "long.xyz")
    assert code == 2
    assert "--allow-large" in err
    assert run(capsys, "long.xyz", "--allow-large")[0] == 0
    (tmp_path / "short.xyz").write_text(WATER)
    code, out, _ = run(capsys, ".")  # the others of a folder are taken
    assert code == 1
    assert "1 of 2 molecules" in out


def test_labels_are_computed_beside_the_molecules(capsys, tmp_path):
    pytest.importorskip("pyscf")
    ask = ("H2", "--output", "here", "--labels", "2", "--grid", "0", "--scf-grid", "1")
    code, out, _ = run(capsys, *ask)
    assert code == 0
    assert "2 of 2 files of molecules and of labels in here" in out
    assert len(list((tmp_path / "here").glob("*.labels.npz"))) == 1
    code, out, _ = run(capsys, *ask)
    assert code == 0
    assert "0 computed" in out
