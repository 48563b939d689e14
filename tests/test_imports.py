"""The rooms of the house: each imports only rooms above it, and the library needs torch alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "torchimplicit"

# From top to bottom. A room may import itself and what stands above it.
ROOMS = (
    "errors",
    "notices",
    "validation",
    "solution",
    "coordinates",
    "state",
    "compiler",
    "members",
    "closure",
    "coupling",
    "saved",
    "auxiliary",
    "inference",
    "precision",
    "constraints",
    "linear",
    "problems",
    "ragged",
    "statement",
    "solvers",
    "defaults",
    "captured",
    "gradients",
    "solve",
    "linear_solve",
    "attach",
    "resolve",
    "derivatives",
    "regularizers",
    "diagnostics",
    "nn",
    "models",
    "testing",
    "recipes",
    "cli",
    "__main__",
)
LIBRARY = ROOMS[: ROOMS.index("testing")]
# What a room may import besides torch and the standard library.
EXTRAS = {"testing": {"pytest"}}

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """The room that a file lies in; ``__init__`` for the package's own."""
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


def _names(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_file_is_in_a_known_room():
    rooms = {room_of(path) for path in FILES} - {"__init__"}
    assert rooms <= set(ROOMS), f"give {sorted(rooms - set(ROOMS))} a place in ROOMS"


@pytest.mark.parametrize("path", FILES, ids=_names)
def test_imports_point_upward(path):
    room = room_of(path)
    allowed = ROOMS[: ROOMS.index("recipes")] if room == "__init__" else ROOMS[: ROOMS.index(room) + 1]
    wrong = []
    for line, module in imports(path):
        if module.split(".")[0] != "torchimplicit":
            continue
        target = module.split(".")[1] if "." in module else "the package itself"
        if target not in allowed or (target == "recipes" and room != "recipes"):
            wrong.append(f"{_names(path)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) in (*LIBRARY, "testing", "__init__")], ids=_names)
def test_the_library_needs_torch_alone(path):
    allowed = {"torch", "torchimplicit"} | sys.stdlib_module_names | EXTRAS.get(room_of(path), set())
    wrong = [f"{_names(path)}:{line} imports {m}" for line, m in imports(path) if m.split(".")[0] not in allowed]
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
