"""A language model in training: its segments, what it remembers between them, and its perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from torchimplicit.models import DEQTransformer
from torchimplicit.models.deq_transformer import Memory
from torchimplicit.recipes.phantom import language_data as wikitext
from torchimplicit.recipes.phantom.language_data import Segment, Stream, Text, check, read
from torchimplicit.recipes.phantom.language_settings import LanguageConfig
from torchimplicit.recipes.runtime.task import Metric, Shard, Split, Task, generator, gradient, solver
from torchimplicit.recipes.runtime.trainer import Trainer

_ARCHIVES = {"wikitext-2": wikitext.WIKITEXT2, "wikitext-103": wikitext.WIKITEXT103}


class LanguageTask(Task):
    """Next-word prediction. Under several processes each reads its own rows of the text.

    Args:
        config: settings; the text is read here.

    Raises:
        UserError: no such text, or too little of it.
    """

    metric = Metric("perplexity", "", "min")

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.config = config
        corpus = read(wikitext.folder_of(_ARCHIVES[config.corpus], config.data_dir), config.vocabulary)
        self.size, self.unknown = len(corpus.words), corpus.unknown
        rows, length = config.optimization.batch_size, config.segment_length
        self.training_stream = Stream(corpus.train, rows, length)
        self.held_out = {
            "validation": Stream(_beginning(corpus.valid, config.validation_tokens), rows, length, whole=True),
            "test": Stream(_beginning(corpus.test, config.test_tokens), rows, length, whole=True),
        }
        self.model = DEQTransformer(
            config.model(self.size), solver=solver(config.equilibria), gradient=gradient(config.equilibria)
        )
        self.memory: Memory | None = None

    def training_batches(self, steps: range, shard: Shard) -> Iterable[Any]:
        return self._loader(self.training_stream, steps, shard)

    def held_out_batches(self, split: Split, shard: Shard) -> Iterable[Any]:
        stream = self.held_out[split]
        return self._loader(stream, range(len(stream)), shard)

    def _loader(self, stream: Stream, steps: range, shard: Shard) -> Iterable[Any]:
        data = _Rows(stream, steps, shard)
        # a generator of its own: a loader without one draws from the global one, which dropout draws from
        own = generator(self.config.optimization.seed, -2)
        return DataLoader(data, batch_size=None, num_workers=self.config.machine.workers, generator=own)

    def begin(self) -> None:
        self.memory = None

    def loss(self, batch: Segment) -> Tensor:
        return self._losses(batch).mean()

    def score(self, batch: Segment) -> Tensor:
        losses = self._losses(batch).double()
        return torch.stack((losses.sum(), losses.new_tensor(losses.numel())))

    def figures(self, sums: list[float]) -> dict[str, float]:
        total, count = sums
        return {"perplexity": math.exp(min(total / count, 700.0)), "loss": total / count}

    def _losses(self, batch: Segment) -> Tensor:
        losses, self.memory = self.model(batch.tokens, batch.targets, None if batch.first else self.memory)
        return losses

    def describe(self) -> str:
        tokens = self.training_stream.rows.numel()
        return (
            f"{self.config.corpus}: {tokens} tokens for training, {self.size} words, <unk> is "
            f"{100 * self.unknown['valid']:.1f} % of the validation text."
        )


def _beginning(text: Text, tokens: int | None) -> Text:
    return Text(text.tokens[:tokens], text.source)


class _Rows(Dataset[Segment]):
    """The segments of some steps, in a process's own rows."""

    def __init__(self, stream: Stream, steps: range, shard: Shard):
        self.stream, self.steps, self.shard = stream, steps, shard

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> Segment:
        if not 0 <= index < len(self.steps):
            raise IndexError(index)
        tokens, targets, first = self.stream.segment(self.steps[index])
        own = slice(self.shard.rank, None, self.shard.world)
        return Segment(tokens[own], targets[own], first)


def ready(config: LanguageConfig) -> None:
    """Raise :class:`~torchimplicit.recipes.runtime.errors.UserError` where the data is not there."""
    if config.data_dir is not None:
        check(config.data_dir)


RUNNER = Trainer(LanguageTask, ready)
