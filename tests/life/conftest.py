from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "nn"))  # for cells.py


@pytest.fixture(autouse=True)
def _one_seed(one_thread: None) -> None:
    torch.manual_seed(0)
