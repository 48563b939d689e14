"""Tasks: what a context is adapted by, and what it must be right on."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Tasks(NamedTuple):
    """Some tasks at once.

    Attributes:
        support, query: samples ``[tasks, samples, ...]``.
        support_targets, query_targets: values ``[tasks, samples, 1]``, or labels ``[tasks, samples]`` (int64).
    """

    support: Tensor
    support_targets: Tensor
    query: Tensor
    query_targets: Tensor
