"""WikiText's three files with made-up words."""

from __future__ import annotations

import random
from pathlib import Path

WORDS = [f"word{i}" for i in range(40)]

NARROW = {
    "segment_length": 8,
    "memory_length": 4,
    "width": 16,
    "heads": 2,
    "head_width": 8,
    "inner_width": 24,
}
"""Settings of a language recipe with a narrow model."""


def write(folder: Path, train: int = 900, held_out: int = 200) -> Path:
    """Lines of ten words, of which some are much more frequent than others."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    for split, count in (("train", train), ("valid", held_out), ("test", held_out)):
        lines = [
            " ".join(chance.choices(WORDS, weights=[1 / (1 + i) for i in range(len(WORDS))], k=9))
            for _ in range(count // 10)
        ]
        (folder / f"wiki.{split}.tokens").write_text("".join(f" {line} \n" for line in lines), encoding="utf-8")
    return folder
