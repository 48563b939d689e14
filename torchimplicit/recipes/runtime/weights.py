"""Weights trained elsewhere, read from a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchimplicit.nn import convert_state_dict
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import no_larger, reason, verify

LARGEST = 1 << 34
"""Largest file accepted, in bytes."""

INSIDE = ("state_dict", "model", "model_state_dict", "net")
"""Keys under which checkpoints store the state dict."""


def begin_with(task: nn.Module, path: Path) -> None:
    """Load the weights of a file into a task's model.

    Nothing in the file is run. Names are those of the task, or of its attribute ``model``; normalizations of TorchDEQ
    and of locuslab's repositories are converted (:func:`torchimplicit.nn.convert_state_dict`).

    Raises:
        UserError: no such file, no state dict, or names and shapes that do not fit, with the first of both.
    """
    no_larger(path, LARGEST)
    try:
        if _is_archive(path):  # torch itself passes over an archive's checksums
            verify(path)
        read = torch.load(path, map_location="cpu", weights_only=True)
    except UserError as error:
        raise UserError(f"--weights: {error}") from None
    except OSError as error:
        raise UserError(f"--weights {path} cannot be read ({error.strerror})") from None
    except Exception as error:  # of what else a file may hold: many kinds
        raise UserError(f"--weights {path} is no file of tensors alone ({reason(error)})") from None
    state = _state(read, path)
    target = task if any(name in state for name in task.state_dict()) else getattr(task, "model", task)
    target = target if not all(name.startswith("task.") for name in state) else nn.ModuleDict({"task": task})
    try:
        converted = convert_state_dict(state, target)
    except ValueError as error:
        raise UserError(f"--weights {path}: {error}") from None
    _fits(target.state_dict(), converted, path)
    target.load_state_dict(converted)


def _is_archive(path: Path) -> bool:
    """Return whether it is a zip archive, as ``torch.save`` has written since version 1.6."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\3\4"


def _state(read: Any, path: Path) -> dict[str, Any]:
    inside = next((read[name] for name in INSIDE if isinstance(read, Mapping) and name in read), read)
    if not isinstance(inside, Mapping) or not any(isinstance(value, Tensor) for value in inside.values()):
        raise UserError(f"--weights {path} holds no state dict, from names to tensors")
    return dict(inside)


def _fits(here: Mapping[str, Any], there: Mapping[str, Any], path: Path) -> None:
    missing, strange = sorted(here.keys() - there.keys()), sorted(there.keys() - here.keys())
    odd = [
        name
        for name in here.keys() & there.keys()
        if getattr(here[name], "shape", 0) != getattr(there[name], "shape", 0)
    ]
    if missing or strange or odd:
        said = [
            *([f"it lacks {len(missing)} tensors, such as {missing[0]}"] if missing else []),
            *([f"it has {len(strange)} that the model has not, such as {strange[0]}"] if strange else []),
            *([f"{odd[0]} is {list(there[odd[0]].shape)}, and {list(here[odd[0]].shape)} in the model"] if odd else []),
        ]
        raise UserError(f"--weights {path} is of another model: {'; '.join(said)}")
