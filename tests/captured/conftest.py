from __future__ import annotations

import os

import pytest
import torch

from torchimplicit.precision import TORCH_RELEASE

if TORCH_RELEASE < (2, 13):  # nothing is compiled there
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def interpreted(monkeypatch):
    """Captured graphs are run as they are, loops and all, not compiled: all but the compiler is tested, in a fifth of
    the time. Memories that nothing has been written to hold NaN. With ``TORCHIMPLICIT_TEST_COMPILER=1`` they are
    compiled nevertheless."""
    if os.environ.get("TORCHIMPLICIT_TEST_COMPILER") == "1":
        yield
        return
    import torch._inductor.compile_fx as inductor

    monkeypatch.setattr(inductor, "compile_fx", lambda graph, *args, **kwargs: graph)
    torch.compiler.reset()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # which fills them so
    yield
    torch.use_deterministic_algorithms(before)
