"""Which samples a step sees: a function of the step and the seed, so that training can begin at any step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from torchimplicit.recipes.training.task import Shard


class ShuffledSteps(Sampler[list[int]]):
    """Batches drawn without replacement: every pass over the data is a permutation, cut into whole batches.

    Args:
        size: how many samples there are.
        batch_size: of all processes together; a larger one than ``size`` is ``size``.
        seed: of the permutations.
        steps: the steps to give batches for.
        shard: this process's share.
    """

    def __init__(self, size: int, batch_size: int, seed: int, steps: range, shard: Shard):
        self.size, self.seed, self.steps, self.shard = size, seed, steps, shard
        self.batch_size = min(size, batch_size)
        self.per_pass = size // self.batch_size

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        order: tuple[int, list[int]] | None = None
        for step in self.steps:
            turn, place = divmod(step, self.per_pass)
            if order is None or order[0] != turn:
                order = turn, permutation(self.size, self.seed, turn)
            batch = order[1][place * self.batch_size : (place + 1) * self.batch_size]
            yield batch[self.shard.rank :: self.shard.world]


class InOrder(Sampler[list[int]]):
    """All samples once, in order, in batches."""

    def __init__(self, size: int, batch_size: int, shard: Shard):
        self.own = range(shard.rank, size, shard.world)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.own) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.own), self.batch_size):
            yield list(self.own[start : start + self.batch_size])


def permutation(size: int, seed: int, turn: int) -> list[int]:
    """The order of one pass."""
    return torch.randperm(size, generator=generator(seed, turn)).tolist()


def generator(seed: int, *place: int) -> torch.Generator:
    """A generator for one place in training, such as a step; different places, and seeds, are unrelated."""
    mixed = 0xCBF29CE484222325
    for part in (seed, *place):  # FNV-1a over whole integers, then the generator's own scrambling
        mixed = ((mixed ^ (part + 1)) * 0x100000001B3) & (2**63 - 1)
    return torch.Generator().manual_seed(mixed)


class Rows(Dataset[Any]):
    """Tensors with the samples in dim 0; a batch is the tuple of their rows."""

    def __init__(self, *tensors: Tensor):
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(t[index] for t in self.tensors)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        chosen = torch.as_tensor(indices)
        return tuple(t[chosen] for t in self.tensors)


def loader(
    data: Dataset[Any], batches: Sampler[list[int]], *, workers: int = 0, collate: Any = None, seed: int = 0
) -> DataLoader[Any]:
    """A loader of these batches; for :class:`Rows` nothing is collated, for others ``None`` means torch's way."""
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_is if isinstance(data, Rows) else collate,
        generator=generator(seed, -2),
    )


def _as_is(batch: Any) -> Any:
    return batch
