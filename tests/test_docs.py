"""Every Python block of the README and of the documentation runs, and every file that they name exists."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import json
import re
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import torchimplicit
from torchimplicit._solve import solve
from torchimplicit.gradients import Gradient, OneStep
from torchimplicit.solvers import Solver
from torchimplicit.testing import GradientSuite, SolverSuite
from torchimplicit.testing.gradient_suite import SuiteCase

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


def _of_extending() -> types.ModuleType:
    module = types.ModuleType("extending")
    sys.modules[module.__name__] = module
    for _, text in blocks(ROOT / "docs" / "extending.md", "python"):
        exec(compile(text, "extending.md", "exec", 0, True), vars(module))
    return module


class TestTheEstimatorsOfExtending(GradientSuite):
    """The worked examples of docs/extending.md do what that page says."""

    kinds = ("fixed_point",)
    bound = 0.3
    second_order = False
    page = _of_extending()

    def make(self) -> Gradient:
        return self.page.TwoTerms()

    def test_a_backward_pass_of_ones_own_is_that_of_one_step(self, case: SuiteCase) -> None:
        grads = []
        for gradient in (self.page.JacobianFree(), OneStep()):
            x = case.x.clone().requires_grad_()
            value = solve(case.problem(case.function), case.z0, x, case.w, gradient=gradient).value
            grads += torch.autograd.grad(value.square().sum(), x)
        torch.testing.assert_close(*grads)


def test_the_linear_solver_of_extending():
    page = TestTheEstimatorsOfExtending.page
    matrix = torch.linspace(1, 4, 5, dtype=torch.float64).diag().expand(3, 5, 5)
    b = torch.arange(15, dtype=torch.float64).reshape(3, 5)
    solution = torchimplicit.linear_solve(matrix, b, solver=page.SteepestDescent(), symmetric=True)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, b / matrix.diagonal(dim1=1, dim2=2), rtol=1e-8, atol=1e-9)


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


API = {
    page.stem: re.findall(r"^::: torchimplicit\.([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    for page in (ROOT / "docs" / "api").glob("*.md")
}
"""What each page of the API describes, by its full name without the package's."""


def test_every_public_name_has_its_place_in_the_api_pages():
    documented = {name.rsplit(".", 1)[-1] for names in API.values() for name in names}
    packages = ("constraints", "derivatives", "diagnostics", "gradients", "linear", "nn", "problems", "regularizers")
    public = {*torchimplicit.__all__} - {"derivatives", "nn", "regularizers"}
    for package in (*packages, "solvers", "testing"):
        public.update(getattr(importlib.import_module(f"torchimplicit.{package}"), "__all__", ()))
    assert public - documented == set()


def test_a_function_is_not_hidden_by_the_module_that_bears_its_name():
    """The generator would describe ``torchimplicit.nn.best_of`` as the module, all its private parts included."""
    modules = [
        name
        for names in API.values()
        for name in names
        if Path(torchimplicit.__file__).parent.joinpath(*name.split(".")).with_suffix(".py").is_file()
    ]
    assert [
        name for name in modules if hasattr(importlib.import_module(f"torchimplicit.{name}"), name.rsplit(".", 1)[-1])
    ] == []


def test_the_overview_of_the_api_names_what_its_pages_describe():
    text = (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    rows = {match[1]: match[0] for match in re.finditer(r"^\| \[[^]]+\]\((\w+)\.md\) \|.*$", text, re.MULTILINE)}
    for page, row in rows.items():
        names = [name.rsplit(".", 1)[-1] for name in API[page]]
        wanted = [name for name in names if name in torchimplicit.__all__]
        wanted += [
            f"{page}.{name}"
            for name in names
            if hasattr(getattr(torchimplicit, page, None), name) and name not in wanted
        ]
        expected = ", ".join(f"`{name}`" for name in wanted)
        assert row.endswith(f"| {expected} |"), f"the row of {page} in docs/api/index.md should name {expected}"


def test_the_readme_shows_the_recorded_speed():
    path = ROOT / "benchmarks" / "performance.py"
    spec = importlib.util.spec_from_file_location("performance", path)
    assert spec is not None
    assert spec.loader is not None
    performance = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(performance)
    shown = performance.BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert shown == [performance.speed(performance.newest("captured"), performance.newest("models"))]


def test_versions_of_the_site_stand_side_by_side(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    publish = importlib.import_module("publish")
    monkeypatch.setattr(publish, "SITE", tmp_path / "site")
    pages = tmp_path / "pages"
    pages.mkdir()
    for version in ("0.1", "0.2", "0.2"):
        (tmp_path / "site").mkdir(exist_ok=True)
        (tmp_path / "site" / "index.html").write_text(version)
        publish.publish(pages, version)
    assert [(pages / name / "index.html").read_text() for name in ("0.1", "0.2", "latest")] == ["0.1", "0.2", "0.2"]
    versions = json.loads((pages / "versions.json").read_text())
    assert [(one["version"], one["aliases"]) for one in versions] == [("0.2", ["latest"]), ("0.1", [])]
    assert "latest/index.html" in (pages / "index.html").read_text()
    assert (pages / ".nojekyll").is_file()


def test_links_and_pictures_that_lead_nowhere_are_found(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    (tmp_path / "one.html").write_text('<h1 id="top"></h1><a href="two.html#there"></a><a href="#top"></a>')
    text = '<p id="there"><img src="no.png"><a href="one.html#gone"></a><a href="https://x.org/y"></a><a href="3.html">'
    (tmp_path / "two.html").write_text(text)
    faults = importlib.import_module("links").broken(tmp_path)
    assert faults == ["two.html: 3.html", "two.html: no.png", "two.html: one.html#gone"]
