"""Your own equation, from a Python file."""

from __future__ import annotations

import hashlib
import runpy
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torchimplicit.models.physics_informed import Field
from torchimplicit.recipes.physics.equations import EQUATIONS, FIELDS, INVERSE, inverse
from torchimplicit.recipes.physics.statement import Equation
from torchimplicit.recipes.runtime.errors import UserError


@dataclass(frozen=True)
class Given:
    """An equation, looked up by name or loaded from a file.

    Attributes:
        equation: itself.
        field: makes the file's own model, if it has one.
        digest: digest of the file; empty for a name.
    """

    equation: Equation
    field: Callable[[Equation], Field] | None = None
    digest: str = ""


def given(equation: str) -> Given:
    """The equation that ``--equation`` names.

    Raises:
        UserError: neither a known name nor a file that defines an equation.
    """
    if equation in EQUATIONS:
        return Given(EQUATIONS[equation])
    if equation in INVERSE:
        return Given(inverse(*INVERSE[equation]))
    if equation in FIELDS:
        return Given(FIELDS[equation]())
    path = Path(equation)
    if path.suffix != ".py":
        raise UserError(
            f"--equation takes one of {', '.join((*EQUATIONS, *INVERSE, *FIELDS))}, or a Python file that defines "
            f"'equation', and it is '{equation}'"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--equation {path} cannot be read ({error.strerror})") from None
    return _of_file(path.resolve(), hashlib.sha256(content).hexdigest())


@lru_cache(maxsize=8)
def _of_file(path: Path, digest: str) -> Given:
    try:
        names = runpy.run_path(str(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:
        raise UserError(f"{path}, line {_line(path, error)}: {type(error).__name__}: {error}") from None
    equation, field = names.get("equation"), names.get("field")
    if not isinstance(equation, Equation):
        cause = "does not define it" if equation is None else f"it is a {type(equation).__name__}"
        raise UserError(
            f"{path} must define 'equation', an Equation of torchimplicit.recipes.physics.statement; {cause}"
        )
    if field is not None and not callable(field):
        raise UserError(f"{path}: 'field' must be a function of the equation that makes its model")
    return Given(equation, field, digest)


def _line(path: Path, error: Exception) -> int:
    if isinstance(error, SyntaxError):
        return error.lineno or 0
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    return lines[-1] if lines and lines[-1] else 0
