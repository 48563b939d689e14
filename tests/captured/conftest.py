from __future__ import annotations

import os
import weakref
from collections import Counter

import pytest
import torch

from torchimplicit import solve_counts
from torchimplicit.captured import Capture, Capturing
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


@pytest.fixture
def compiled_as_declared(request, monkeypatch):
    """Every solve of the test is compiled, and so is every first-order backward pass; or ``falls_back`` of its class
    has the test's name, with a part of the warning that says why not, or nothing where the eager path takes over
    without one."""
    counts, before = Counter(), solve_counts()
    monkeypatch.setattr("torchimplicit.coupling._memories", weakref.WeakKeyDictionary())

    def counted(owner, name, as_what):
        method = getattr(owner, name)

        def call(*args):
            result = method(*args)
            counts["asked for" if as_what is None else as_what if result is not None else "given up"] += 1
            return result

        monkeypatch.setattr(owner, name, call)

    counted(Capturing, "tensors", None)
    counted(Capture, "solve", "solved")
    for name in ("pull", "come_back"):
        counted(Capture, name, "differentiated")
    yield counts
    reasons = [kind for kind in (solve_counts() - before).warnings if kind.startswith("not captured: ")]
    declared = request.cls.falls_back.get(request.node.originalname)
    if not counts["asked for"]:
        return
    if declared is None:
        assert not reasons
        assert counts["solved"] >= counts["asked for"]
        assert not counts["given up"]
    else:
        assert counts["solved"] < counts["asked for"] or counts["given up"], "it is compiled, and not declared so"
        assert bool(reasons) == bool(declared)
        assert all(declared in reason for reason in reasons)
