"""The layers of the package: each imports only from those above it, and the library needs torch alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "torchimplicit"

# The order that CONTRIBUTING.md states, from top to bottom: a layer may import itself and what stands above it.
_GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
_ORDER = re.search(r"from those above it:\n\n(.+?)\n\n", _GUIDE, re.DOTALL)
assert _ORDER, "CONTRIBUTING.md no longer lists the layers"
LAYERS = re.findall(r"`(\w+)`", _ORDER[1])
LIBRARY = LAYERS[: LAYERS.index("testing")]
# What a layer may import besides torch and the standard library.
EXTRAS = {"testing": {"pytest"}}

FILES = sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    """The layer that a file lies in; ``__init__`` for the package's own."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


class _Imports(ast.NodeVisitor):
    """Collects absolute module names, leaving out what is imported for annotations only."""

    def __init__(self, path: Path):
        self.found: list[tuple[int, str]] = []
        self.package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for child in node.orelse:
                self.visit(child)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(node.lineno, alias.name) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if node.level:
            parts = self.package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1])
            module = f"{base}.{module}" if module else base
        if module == "torchimplicit":
            self.found += [(node.lineno, f"torchimplicit.{alias.name}") for alias in node.names]
        else:
            self.found.append((node.lineno, module))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every module that a file imports, at whatever depth."""
    visitor = _Imports(path)
    visitor.visit(ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))
    yield from visitor.found


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_layers_that_are_listed_are_those_that_exist():
    assert {layer_of(path) for path in FILES} - {"__init__"} == set(LAYERS), "mend the list in CONTRIBUTING.md"


def test_imports_point_upward():
    wrong = []
    for path in FILES:
        layer = layer_of(path)
        allowed = LAYERS[: LAYERS.index("recipes")] if layer == "__init__" else LAYERS[: LAYERS.index(layer) + 1]
        for line, module in imports(path):
            package, _, inside = module.partition(".")
            target = inside.split(".")[0] or "the package itself"
            if package == "torchimplicit" and (target not in allowed or (target == "recipes" and layer != "recipes")):
                wrong.append(f"{_name(path)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_the_library_needs_torch_alone():
    wrong = []
    for path in FILES:
        if (layer := layer_of(path)) in (*LIBRARY, "testing", "__init__"):
            allowed = {"torch", "torchimplicit"} | sys.stdlib_module_names | EXTRAS.get(layer, set())
            foreign = [(line, module) for line, module in imports(path) if module.split(".")[0] not in allowed]
            wrong += [f"{_name(path)}:{line} imports {module}" for line, module in foreign]
    assert not wrong, "\n".join(wrong)


_PRIVATE = re.compile(r"\btorch\._(?!dynamo|_version)\w+|forward_ad\._|torch\.overrides\._|_execution_engine")


def test_what_torch_does_not_document_is_taken_in_one_place():
    wrong = []
    for path in FILES:
        if layer_of(path) in LIBRARY and layer_of(path) not in ("_torch", "captured"):
            found = set(_PRIVATE.findall(path.read_text(encoding="utf-8")))
            wrong += [f"{_name(path)} uses {name}" for name in sorted(found)]
    assert not wrong, "\n".join(wrong)


def test_importing_the_package_brings_no_recipes():
    code = (
        "import sys, torchimplicit\n"
        "unwanted = {'lightning', 'pytorch_lightning', 'tyro', 'rich', 'matplotlib', 'sklearn', 'pytest',\n"
        "            'torchimplicit.recipes', 'torchimplicit.cli'}\n"
        "print(sorted(unwanted & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["list"]], ids=lambda arguments: arguments[0])
def test_the_command_line_says_what_there_is_without_loading_what_it_runs_with(arguments):
    """As many modules as torch itself has would make it twice as slow to answer as torch is to import."""
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "from torchimplicit.cli import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit:\n"
        "    pass\n"
        "print('\\n', *sorted(set(sys.modules) - before))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = result.stdout.splitlines()[-1].split()
    roots = {name.split(".")[0] for name in loaded}
    heavy = {
        "lightning",
        "pytorch_lightning",
        "matplotlib",
        "scipy",
        "sklearn",
        "skimage",
        "numpy",
        "PIL",
        "torchvision",
    }
    assert "torchimplicit" in roots
    assert not heavy & roots
    assert "torch._dynamo" not in loaded
    assert len(loaded) < 400  # about 300; torch brings 1,100
