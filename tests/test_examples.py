"""Every example runs as a user runs it, says what it found without a warning, and draws its picture."""

import ast
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example(path, tmp_path):
    for needed in ("sklearn", "matplotlib"):
        pytest.importorskip(needed)
    picture = tmp_path / "picture.png"
    ran = subprocess.run([sys.executable, path, picture], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "Warning" not in ran.stderr
    assert ran.stdout.strip()
    assert picture.stat().st_size > 5000
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 100


def test_every_example_is_on_its_page():
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    assert all(f"$ python examples/{path.name}" in page for path in EXAMPLES)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_notebook_holds_the_whole_example(path, monkeypatch):
    pytest.importorskip("markdown")
    monkeypatch.syspath_prepend(ROOT / "docs")
    script = path.read_text(encoding="utf-8")
    made = json.loads(import_module("extensions.notebooks").notebook(path.stem, script))
    title, arguments, *code = (cell["source"] for cell in made["cells"])
    assert title.startswith(f"# {ast.get_docstring(ast.parse(script)).splitlines()[0]}")
    assert "sys.argv" in arguments
    assert ast.dump(ast.parse("\n".join(code))) == ast.dump(ast.Module(ast.parse(script).body[1:], []))
    assert len({cell["id"] for cell in made["cells"]}) == len(made["cells"])
