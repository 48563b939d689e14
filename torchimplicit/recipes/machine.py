"""The device and the threads that a recipe asks for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from torchimplicit.recipes.errors import UserError

DeviceName = Literal["auto", "cpu", "cuda"]


def device(name: DeviceName, count: int = 1) -> torch.device:
    """Where to train: ``auto`` takes a GPU if there is one.

    Raises:
        UserError: if a GPU is asked for and there is none, or fewer than ``count``.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device cuda: PyTorch finds no CUDA device here; use --device cpu, or install a CUDA build")
    chosen = torch.device("cuda" if available and name != "cpu" else "cpu")
    if chosen.type == "cuda" and count > torch.cuda.device_count():
        raise UserError(f"--devices {count}: PyTorch finds {torch.cuda.device_count()} CUDA devices here")
    return chosen


def clock(where: torch.device, *, wall: bool = False) -> Callable[[], float]:
    """A function that waits for the device and reads the time, in seconds.

    On a CPU it is the time of this process, which other processes do not lengthen; on a GPU, or with ``wall``, that of
    the wall.
    """
    if where.type != "cuda":
        return time.perf_counter if wall else time.process_time

    def read() -> float:
        torch.cuda.synchronize(where)
        return time.perf_counter()

    return read


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch's number of CPU threads, while the context lasts; 0 leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
