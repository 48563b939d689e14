"""Where a solve begins when one like it has been solved before."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchimplicit.closure import is_transformed
from torchimplicit.validation import at_least


@final
class WarmStart(nn.Module):
    """Begins each solve at a solution found before, where that has the same structure, shapes, dtype and device.

    Without ``samples`` it is the last solution: for inputs that change little from one call to the next (full-batch
    training, graphs, video, implicit fields); a batch of another size begins cold. With ``samples`` it is the last
    solution *of each sample*: for training in shuffled batches, with ``layer(x, index=index)``, where ``index`` tells
    which samples the batch holds. In eval mode it may be left out, for other samples: they begin cold, and are not
    remembered.

    The memory is not part of the ``state_dict``, nor of copies, and training and evaluation keep their own. Solutions
    that are not finite are not remembered.

    Args:
        samples: how many samples there are; ``None`` for one memory of the last batch. The table holds one state per
            sample, on the state's device.
        refresh: in training, carry a remembered state along by so many evaluations of the cell, in place of a solve
            (the amortized fixed points of Huang et al. 2021, (Implicit)²: weights that move little in a step move the
            equilibrium little). The last of these evaluations serves the backward pass too, so that with ``refresh=1``
            and a truncated series of T products a training step evaluates the cell once. A batch with a state that is
            not remembered is solved, and so is every one in eval mode. First derivatives only, by
            :class:`~torchimplicit.Implicit` or an estimator of the adjoint such as
            :class:`~torchimplicit.NeumannPhantom`. ``None``: solve every time.
    """

    def __init__(self, samples: int | None = None, *, refresh: int | None = None) -> None:
        super().__init__()
        if samples is not None:
            at_least("WarmStart", "samples", samples, 1)
        if refresh is not None:
            at_least("WarmStart", "refresh", refresh, 1)
        self.samples = samples
        self.refresh = refresh
        self._last: dict[bool, Any] = {}
        self._seen: dict[bool, Tensor] = {}

    def check(self, z: Any, index: Tensor | None) -> None:
        """Raise where ``index`` does not fit this memory or the state ``z``."""
        if index is None and not self.training:
            return
        if (self.samples is None) != (index is None):
            raise ValueError(
                "an index came to a WarmStart that remembers no samples: make it as WarmStart(samples=...)"
                if self.samples is None
                else "WarmStart(samples=...) needs to know which samples it is given: call the layer with index=..."
            )
        if index is not None:
            rows = {leaf.shape[0] if leaf.ndim else None for leaf in pytree.tree_leaves(z)}
            if index.dtype != torch.int64 or {*index.shape} != rows or index.ndim != 1:
                raise ValueError(f"index must be int64 [batch], and is {index.dtype} {list(index.shape)}")

    def get(self, z0: Any, index: Tensor | None = None) -> Any:
        """The last solution if it looks like ``z0``, else ``z0``; for the samples ``index``, those that were seen."""
        return self.recall(z0, index)[0]

    def recall(self, z0: Any, index: Tensor | None = None) -> tuple[Any, bool]:
        """As :meth:`get`, and whether all of it was remembered."""
        last = self._last.get(self.training)
        if last is None or self._foreign(index) or not _alike(last, z0, rows=index is None):
            return z0, False
        if index is None:
            return last, True
        found = pytree.tree_map(lambda table: table[index], last)
        seen = self._seen[self.training][index]
        if bool(seen.all()):
            return found, True
        mixed = pytree.tree_map(
            lambda warm, cold: torch.where(seen.reshape(-1, *(1,) * (cold.ndim - 1)), warm, cold), found, z0
        )
        return mixed, False

    @torch.inference_mode(False)
    @torch.no_grad()
    def put(self, z: Any, index: Tensor | None = None) -> None:
        """Remember the solution ``z``, of the samples ``index``. What is remembered in inference mode can be used
        outside it."""
        leaves = pytree.tree_leaves(z)
        if self._foreign(index) or any(is_transformed(leaf) for leaf in leaves):
            return
        if index is None:
            if all(bool(torch.isfinite(leaf).all()) for leaf in leaves):
                self._last[self.training] = pytree.tree_map(torch.clone, z)  # the caller may change its own in place
            return
        assert self.samples is not None
        table = self._last.get(self.training)
        if table is None or not _alike(table, z, rows=False):
            table = pytree.tree_map(lambda t: t.new_zeros(self.samples, *t.shape[1:]), z)
            self._last[self.training] = table
            self._seen[self.training] = torch.zeros(self.samples, dtype=torch.bool, device=leaves[0].device)
        finite = torch.stack([torch.isfinite(leaf).flatten(1).all(dim=1) for leaf in leaves]).all(dim=0)
        every = bool(finite.all())
        rows = index if every else index[finite]
        for store, leaf in zip(pytree.tree_leaves(table), leaves, strict=True):
            store[rows] = leaf if every else leaf[finite]
        self._seen[self.training][rows] = True

    def _foreign(self, index: Tensor | None) -> bool:
        """Whether the batch holds none of the samples that are remembered."""
        return self.samples is not None and index is None

    def reset(self) -> None:
        """Forget."""
        self._last.clear()
        self._seen.clear()

    def extra_repr(self) -> str:
        given = {"samples": self.samples, "refresh": self.refresh}
        return ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_last": {}, "_seen": {}}


def _alike(a: Any, b: Any, rows: bool = True) -> bool:
    """Whether the trees look the same; with ``rows=False``, but for the size of dim 0."""
    (xs, x_spec), (ys, y_spec) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    skipped = 0 if rows else 1
    return x_spec == y_spec and all(
        x.shape[skipped:] == y.shape[skipped:] and x.dtype == y.dtype and x.device == y.device
        for x, y in zip(xs, ys, strict=True)
    )
