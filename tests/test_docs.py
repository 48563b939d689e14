"""Every Python block of the README and of the documentation runs, and every file that they name exists."""

from __future__ import annotations

import ast
import functools
import re
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from torchimplicit.solvers import Solver
from torchimplicit.testing import SolverSuite

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[a-z]*)[^\n]*$")
_NAMED = re.compile(r"\b(?P<path>(?:tests|benchmarks)/[\w./-]+\.\w+)(?:::(?P<name>\w+))?")


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The fenced blocks in ``language``: the line of the first statement, and the text."""
    found: list[tuple[int, str]] = []
    current: list[str] | None = None
    start, indent, wanted = 0, "", False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = _FENCE.match(line)
        if current is None and fence:
            current, start, indent, wanted = [], number + 1, fence["indent"], fence["language"] == language
        elif current is not None and line.strip() == "```":
            if wanted:
                found.append((start, "\n".join(current) + "\n"))
            current = None
        elif current is not None:
            current.append(line.removeprefix(indent))
    assert current is None, f"{page.name}: a fence is not closed"
    return found


def _names(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=_names)
def test_python_blocks_run(page, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    dtype = torch.get_default_dtype()
    request.addfinalizer(lambda: torch.set_default_dtype(dtype))
    module = types.ModuleType("documentation_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses and pickle look
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(0)
        warnings.simplefilter("error", UserWarning)
        for line, text in blocks(page, "python"):
            code = compile("\n" * (line - 1) + text, str(page), "exec", dont_inherit=True)
            exec(code, vars(module))


class TestTheSolverOfContributing(SolverSuite):
    """The worked example of CONTRIBUTING passes the suite of which it speaks."""

    @functools.cached_property
    def solver(self) -> type[Solver]:
        module = types.ModuleType("contributing")
        sys.modules[module.__name__] = module
        exec(
            compile(blocks(ROOT / "CONTRIBUTING.md", "python")[0][1], "CONTRIBUTING.md", "exec", 0, True), vars(module)
        )
        return module.Aitken

    def make(self, **options: Any) -> Solver:
        return self.solver(**options)


@pytest.mark.parametrize("page", PAGES, ids=_names)
def test_named_tests_and_benchmarks_exist(page):
    for match in _NAMED.finditer(page.read_text(encoding="utf-8")):
        path = ROOT / match["path"]
        assert path.is_file(), f"{_names(page)} names {match['path']}"
        if match["name"]:
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            defined = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
            assert match["name"] in defined, f"{_names(page)} names {match[0]}"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=_names)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), f"{_names(page)} links to {target}"


def test_the_readme_starts_with_its_two_commands():
    demo, tests = blocks(ROOT / "README.md", "sh")[:2]
    assert demo[1].rstrip().endswith("torchimplicit demo")
    assert "pytest" in tests[1].splitlines()[-1]
    for _, text in (demo, tests):
        assert text.startswith("python3.11 -m venv")
        assert "-c constraints.txt" in text


def test_every_public_name_has_its_place_in_the_api_pages():
    import torchimplicit

    documented = {
        line.rsplit(".", 1)[-1]
        for page in (ROOT / "docs" / "api").glob("*.md")
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith("::: ")
    }
    names = {*torchimplicit.__all__, *torchimplicit.nn.__all__, *torchimplicit.regularizers.__all__}
    assert names - documented == {"derivatives", "nn", "regularizers"}
