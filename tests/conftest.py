import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

H2 = Path(__file__).parent / "data" / "h2.npz"

ALONE = "TORCHIMPLICIT_TEST_ALONE"

if "PYTEST_XDIST_WORKER" in os.environ:
    # one process a core: more threads would only wait for each other
    torch.set_num_threads(1)


SLOW = frozenset((Path(__file__).parent / "slow.txt").read_text(encoding="utf-8").split())
"""The tests that take a second or more: nearly all the time of the suite."""


def pytest_collection_modifyitems(items):
    for item in items:
        left_out = any(item.get_closest_marker(name) for name in ("long", "thousands"))
        if left_out or item.nodeid.partition("[")[0] in SLOW:
            item.add_marker("slow")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test marked ``alone`` runs in a process of its own.

    After a compilation that failed, torch 2.13 leaves its frame evaluation on. Python then keeps a call's arguments
    alive until the call returns, and whoever counts what is alive counts one state more.
    """
    if pyfuncitem.get_closest_marker("alone") is None or ALONE in os.environ:
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    ran = subprocess.run(
        command, cwd=pyfuncitem.config.rootpath, env={**os.environ, ALONE: "1"}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return True


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
