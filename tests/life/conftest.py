from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "nn"))  # for cells.py


@pytest.fixture(autouse=True)
def _one_thread_one_seed() -> Iterator[None]:
    """Matrices this small are not worth a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
