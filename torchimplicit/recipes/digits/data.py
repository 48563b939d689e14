"""scikit-learn's bundled digits: 1797 real handwritten digits of 8×8 pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, TensorDataset

VALIDATION_SHARE = 0.2


class Split(NamedTuple):
    """Images ``[n, 1, 8, 8]`` in [0, 1] and labels ``[n]``."""

    images: Tensor
    labels: Tensor

    def dataset(self) -> TensorDataset:
        """For a loader."""
        return TensorDataset(self.images, self.labels)


def load(split_seed: int) -> tuple[Split, Split]:
    """The training and the validation split, stratified by class; no image is in both."""
    digits = load_digits()
    images = torch.as_tensor(digits.images / 16, dtype=torch.float32)[:, None]
    labels = torch.as_tensor(digits.target, dtype=torch.int64)
    train, validation = train_test_split(
        range(len(labels)), test_size=VALIDATION_SHARE, random_state=split_seed, stratify=digits.target
    )
    return Split(images[train], labels[train]), Split(images[validation], labels[validation])


class EpochShuffle(Sampler[int]):
    """A new order for every epoch that depends on the seed and the epoch alone: a resumed run sees the same batches.

    Lightning calls :meth:`set_epoch`.
    """

    def __init__(self, size: int, seed: int):
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.size, generator=generator).tolist())


def batches(train: Split, batch_size: int, seed: int) -> DataLoader:
    """Shuffled training batches, all of one size."""
    shuffle = EpochShuffle(len(train.labels), seed)
    return DataLoader(train.dataset(), batch_size=batch_size, sampler=shuffle, drop_last=True)
