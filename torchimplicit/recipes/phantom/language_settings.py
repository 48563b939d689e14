"""The settings of the language recipes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torchimplicit.models import DEQTransformerConfig, deq_transformer_small, deq_transformer_wikitext103
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, Optimization, not_negative, option, positive


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """A DEQ transformer that learns to predict the next word of WikiText.

    --batch-size is the number of rows into which a text is cut; they are read side by side, in segments, and the model
    remembers the end of the last segment. It forgets where a text begins anew, and at every validation of a training
    (every --validate-every steps), so that a run that is resumed there sees what an undisturbed one does.
    """

    optimization: Optimization = field(default_factory=Optimization)
    equilibria: Equilibria = field(default_factory=Equilibria)
    machine: Machine = field(default_factory=Machine)

    corpus: Literal["wikitext-2", "wikitext-103"] = "wikitext-2"
    """Which text."""

    data_dir: Path | None = None
    """The folder with wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens; downloaded by default."""

    vocabulary: int | None = 10000
    """How many words are told apart: the most frequent ones; the others are <unk>. Perplexities compare at one
    vocabulary only."""

    segment_length: int = 64
    """Tokens of a segment in every row."""

    memory_length: int = 32
    """Past positions that a segment may attend to."""

    context_length: int = 256
    """The most positions that a segment and its memory may have together."""

    validation_tokens: int | None = None
    """Validate on so many tokens from the beginning of the validation text; all by default."""

    test_tokens: int | None = None
    """Likewise for the test."""

    normalization: Literal["post", "pre"] = "post"
    """Where the layer normalizations stand."""

    width: int = 128
    """Of the state."""

    heads: int = 4
    """Of the attention."""

    head_width: int = 32
    """Of a head."""

    inner_width: int = 512
    """Of the feed-forward layer."""

    cutoffs: tuple[int, ...] = (2000,)
    """Where the clusters of the vocabulary begin."""

    cluster_factor: int = 2
    """By which every further cluster's embeddings are narrower."""

    dropout: float = 0.0
    """Share that is dropped, with one mask a segment."""

    attention_dropout: float = 0.0
    """Likewise, of the attention's weights."""

    weight_norm: bool = False
    """Normalize the weights of the layer."""

    def __post_init__(self) -> None:
        positive(self, "segment_length", "context_length", "validation_tokens", "test_tokens")
        not_negative(self, "memory_length")
        if self.segment_length + self.memory_length > self.context_length:
            raise UserError(
                f"{option('segment_length')} {self.segment_length} and {option('memory_length')} {self.memory_length} "
                f"are together longer than {option('context_length')} {self.context_length}"
            )
        self.model(self.vocabulary or 10**6)

    def model(self, vocabulary: int) -> DEQTransformerConfig:
        """The model for a vocabulary of this size."""
        try:
            return DEQTransformerConfig(
                vocabulary=vocabulary,
                d_model=self.width,
                heads=self.heads,
                d_head=self.head_width,
                d_inner=self.inner_width,
                cutoffs=self.cutoffs,
                div_val=self.cluster_factor,
                normalization=self.normalization,
                dropout=self.dropout,
                attention_dropout=self.attention_dropout,
                weight_norm=self.weight_norm,
                memory=self.memory_length,
                context=self.context_length,
            )
        except (ValueError, TypeError) as error:
            raise UserError(f"there is no such model: {error}") from None


def wikitext2() -> LanguageConfig:
    """Minutes on one core."""
    return _with_model(
        deq_transformer_small(),
        corpus="wikitext-2",
        segment_length=64,
        validation_tokens=20000,
        optimization=Optimization(
            steps=800, batch_size=8, learning_rate=2e-3, warmup_steps=50, clip_norm=1.0, validate_every=100
        ),
        equilibria=Equilibria(phantom_damping=0.8),
    )


def wikitext103(normalization: Literal["post", "pre"] = "post") -> LanguageConfig:
    """The settings of Bai et al. (2019, 2021) and Geng et al. (2021), for GPUs.

    Their backward solver is Broyden with 35 steps, ours GMRES with as many. PreLN goes with Jacobian regularization and
    14 steps each way.
    """
    pre = normalization == "pre"
    return _with_model(
        deq_transformer_wikitext103(normalization=normalization),
        corpus="wikitext-103",
        vocabulary=None,
        segment_length=150,
        optimization=Optimization(
            steps=300_000,
            batch_size=56,
            learning_rate=2.5e-4,
            warmup_steps=16_000,
            clip_norm=0.25,
            validate_every=5000,
        ),
        equilibria=Equilibria(
            solver_steps=14 if pre else 30,
            backward_steps=14 if pre else 35,
            phantom_damping=0.8,
            pretrain_steps=32_000,
            pretrain_depth=2,
            jacobian_weight=2.0 if pre else 0.0,
            jacobian_probability=0.4 if pre else 1.0,
        ),
    )


def _with_model(model: DEQTransformerConfig, vocabulary: int | None = 10000, **settings: object) -> LanguageConfig:
    return LanguageConfig(
        vocabulary=vocabulary,
        normalization=model.normalization,
        width=model.d_model,
        heads=model.heads,
        head_width=model.d_head,
        inner_width=model.d_inner,
        cutoffs=model.cutoffs,
        cluster_factor=model.div_val,
        dropout=model.dropout,
        attention_dropout=model.attention_dropout,
        weight_norm=model.weight_norm,
        memory_length=model.memory,
        context_length=model.context,
        **settings,  # type: ignore[arg-type]
    )
