"""The command line, ``torchimplicit COMMAND ...``; ``torchimplicit --help`` lists the commands.

This file turns errors into one line of text and an exit code: 0 for success, 1 for a failure, 2 for bad input, 130 for
an interruption. The commands are in :mod:`torchimplicit.recipes.commands`, which is imported by name, since nothing in
the library imports recipes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from importlib.util import find_spec

EXTRA = {
    "lightning": "lightning",
    "tyro": "tyro",
    "rich": "rich",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "submitit": "submitit",
    "tensorboard": "tensorboard",
}
"""The modules that the ``recipes`` extra installs, with the names of their distributions."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; ``argv`` without the program's name."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(metadata.version("torchimplicit"))
        return 0
    missing = [name for module, name in EXTRA.items() if find_spec(module) is None]
    if missing:
        return _fail(
            f"the command line needs {', '.join(missing)} (not installed); run: pip install 'torchimplicit[recipes]'"
        )
    errors = import_module("torchimplicit.recipes.runtime.errors")
    execution = import_module("torchimplicit.recipes.runtime.execution")
    launch = import_module("torchimplicit.recipes.runtime.launch")
    try:
        with execution.terminated_like_interrupted():
            code: int = launch.together(lambda: _run(arguments), execution.follow)
    except errors.UserError as error:
        return _fail(str(error), code=2)
    return code


def _run(arguments: list[str]) -> int:
    errors = import_module("torchimplicit.recipes.runtime.errors")
    solve_error = import_module("torchimplicit.errors").SolveError
    try:
        code: int = import_module("torchimplicit.recipes.commands").main(arguments)
    except errors.UserError as error:
        return _fail(str(error), code=2)
    except (errors.DivergedError, solve_error) as error:
        return _fail(f"training diverged: {error}; a smaller --learning-rate may help")
    except BrokenPipeError:  # the reader of the output, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted", code=130)
    return code


def _fail(line: str, code: int = 1) -> int:
    print(f"torchimplicit: {' '.join(line.splitlines())}", file=sys.stderr)
    return code
