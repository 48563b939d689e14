"""Cross-validation in which the test part chooses nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sklearn.model_selection import StratifiedKFold, train_test_split

from torchimplicit.recipes.runtime.errors import UserError


class Fold(NamedTuple):
    """Indices of the samples in each part; the three are disjoint and are all samples together."""

    train: list[int]
    validation: list[int]
    test: list[int]


def folds(labels: Sequence[int], count: int = 10, validation: float = 0.1, seed: int = 42) -> list[Fold]:
    """``count`` folds, in every part of which each class has its share.

    The test parts are disjoint and cover all samples. The published runs report the best epoch on the test part; here
    a part of the training samples is set apart to choose the epoch by.

    Args:
        labels: of every sample.
        count: how many folds.
        validation: the share of the samples outside the test part that is set apart.
        seed: of the shuffle.

    Raises:
        UserError: a class has too few samples.
    """
    rarest, members = min(Counter(labels).items(), key=lambda item: item[1])
    if members < max(count, 2):
        raise UserError(f"class {rarest} has {members} samples, too few for {count} folds")
    y = np.asarray(labels)
    made = []
    for rest, test in StratifiedKFold(count, shuffle=True, random_state=seed).split(np.zeros(len(y)), y):
        train, chosen = train_test_split(rest, test_size=validation, random_state=seed, stratify=y[rest])
        made.append(Fold(sorted(train.tolist()), sorted(chosen.tolist()), test.tolist()))
    return made
