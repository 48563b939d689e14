from pathlib import Path

import pytest
import torch

H2 = Path(__file__).parent / "data" / "h2.npz"


@pytest.fixture
def one_thread():
    """Small tensors gain nothing from more threads, and a busy machine loses much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def h2():
    """The hydrogen molecule, float64, as PySCF computed it (tests/data/README.md)."""
    pytest.importorskip("numpy")
    from torchimplicit.recipes.density.storage import load

    return load(H2)
