"""Warm starts: a solve begins at a remembered solution."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchimplicit.closure import is_transformed
from torchimplicit.validation import at_least


@final
class WarmStart(nn.Module):
    """Begins each solve at a remembered solution of the same structure, shapes, dtype and device.

    Without ``samples``, it remembers the last batch: for inputs that change little from one call to the next
    (full-batch training, graphs, video, implicit fields). A batch of another size begins cold. With ``samples``, it
    remembers the last solution *of each sample*: for training in shuffled batches, with ``layer(x, index=index)``,
    where ``index`` holds the numbers of the batch's samples. In eval mode ``index`` may be left out for samples outside
    the training set: they begin cold and are not remembered.

    The memory is not part of the ``state_dict``, nor of copies, and training and evaluation have separate memories.
    Non-finite solutions are not remembered.

    Args:
        samples: the number of samples; ``None`` for one memory of the last batch. The table holds one state per
            sample, on the state's device.
        refresh: in training, the number of evaluations of the cell that replace the solve from a remembered state (the
            amortized fixed points of Huang et al. 2021, (Implicit)²: weights that move little in a step move the
            equilibrium little). The last of these evaluations is also the one of the backward pass, so that with
            ``refresh=1`` and a truncated series of T products a training step evaluates the cell once. A batch with a
            state that is not remembered is solved, as is every batch in eval mode. First derivatives only, by
            :class:`~torchimplicit.Implicit` or an estimator of the adjoint such as
            :class:`~torchimplicit.NeumannPhantom`. ``None``: solve every time.

    Raises:
        ValueError: ``samples`` or ``refresh`` is below 1.
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
        """Raise if ``index`` does not fit this memory or the state ``z``."""
        if index is None and not self.training:
            return
        if (self.samples is None) != (index is None):
            raise ValueError(
                "index needs WarmStart(samples=...), but this WarmStart does not remember single samples"
                if self.samples is None
                else "WarmStart(samples=...) needs the numbers of the batch's samples: call the layer with index=..."
            )
        if index is not None:
            rows = {leaf.shape[0] if leaf.ndim else None for leaf in pytree.tree_leaves(z)}
            if index.dtype != torch.int64 or {*index.shape} != rows or index.ndim != 1:
                raise ValueError(f"index must be int64 [batch], not {index.dtype} {list(index.shape)}")

    def get(self, z0: Any, index: Tensor | None = None) -> Any:
        """The remembered solution if it has the form of ``z0``, else ``z0``; with ``index``, sample by sample."""
        return self.recall(z0, index)[0]

    def recall(self, z0: Any, index: Tensor | None = None) -> tuple[Any, bool]:
        """The state of :meth:`get`, and whether all of it was remembered."""
        last = self._last.get(self.training)
        if last is None or self._unknown(index) or not _alike(last, z0, rows=index is None):
            return z0, False
        if index is None:
            return last, True
        stored = pytree.tree_map(lambda table: table[index], last)
        seen = self._seen[self.training][index]
        if bool(seen.all()):
            return stored, True
        mixed = pytree.tree_map(
            lambda warm, cold: torch.where(seen.reshape(-1, *(1,) * (cold.ndim - 1)), warm, cold), stored, z0
        )
        return mixed, False

    @torch.inference_mode(False)
    @torch.no_grad()
    def put(self, z: Any, index: Tensor | None = None) -> None:
        """Remember ``z`` as the solution of the samples ``index``."""
        # inference mode is switched off above: its tensors could not be used in a later solve that records gradients
        leaves = pytree.tree_leaves(z)
        if self._unknown(index) or any(is_transformed(leaf) for leaf in leaves):
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

    def _unknown(self, index: Tensor | None) -> bool:
        """Return whether this memory is per sample and the batch's samples are not known."""
        return self.samples is not None and index is None

    def reset(self) -> None:
        """Forget all solutions, of training and of evaluation."""
        self._last.clear()
        self._seen.clear()

    def extra_repr(self) -> str:
        options = {"samples": self.samples, "refresh": self.refresh}
        return ", ".join(f"{name}={value}" for name, value in options.items() if value is not None)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_last": {}, "_seen": {}}


def _alike(a: Any, b: Any, rows: bool = True) -> bool:
    """Return whether two trees have the same structure, shapes, dtypes and devices; ``rows=False`` ignores the size of
    dim 0."""
    (xs, x_spec), (ys, y_spec) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    skipped = 0 if rows else 1
    return x_spec == y_spec and all(
        x.shape[skipped:] == y.shape[skipped:] and x.dtype == y.dtype and x.device == y.device
        for x, y in zip(xs, ys, strict=True)
    )
