"""The sizes of a DEQ transformer, and the named ones."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, final

from torchimplicit.validation import check_count, check_positive


@final
@dataclass(frozen=True, kw_only=True)
class DEQTransformerConfig:
    """Sizes and choices of a :class:`DEQTransformer`.

    Args:
        vocabulary: number of tokens; the most frequent have the lowest numbers.
        d_model: width of the state.
        heads, d_head: number of attention heads, and the width of each.
        d_inner: width of the feed-forward layer.
        d_embed: width of the first cluster's embeddings; ``None``: ``d_model``.
        cutoffs: where the clusters of the vocabulary begin, rising (Grave et al. 2017, arXiv 1609.04309); ``()``: one.
        div_val: each further cluster's embeddings are narrower by this factor.
        tied: whether the softmax shares the embeddings, and the projections of the further clusters.
        normalization: ``"post"``: each branch is added to the state and the sum is normalized. ``"pre"``: the branches
            take the normalized state. The layer normalizations have no weights.
        dropout: dropout rate of embeddings, branches and output, with one mask for all positions of a sequence.
        attention_dropout: dropout rate of the attention weights.
        weight_norm: whether the weights of the map are weight-normalized, row by row.
        memory: number of past positions that are kept for the next segment.
        context: the most positions that a segment and its memory may have together.
        window: number of positions that a token attends to, itself included; ``None``: all.
        gain, injection_gain: the weights that meet the state, and those that meet the input, start from a normal
            distribution of standard deviation ``gain / sqrt(fan_in)``. The normalization divides the scale of the sum
            out again, so that the map contracts where the input's part of it is the larger one.

    Raises:
        ValueError, TypeError: a value is out of range or of the wrong type.
    """

    vocabulary: int
    d_model: int
    heads: int
    d_head: int
    d_inner: int
    d_embed: int | None = None
    cutoffs: tuple[int, ...] = ()
    div_val: int = 1
    tied: bool = True
    normalization: Literal["post", "pre"] = "post"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    weight_norm: bool = False
    memory: int = 0
    context: int = 512
    window: int | None = None
    gain: float = 0.5
    injection_gain: float = 1.0

    def __post_init__(self) -> None:
        for name in ("vocabulary", "d_model", "heads", "d_head", "d_inner", "div_val", "context"):
            check_count(self, name)
        for name in ("d_embed", "window"):
            if getattr(self, name) is not None:
                check_count(self, name)
        check_count(self, "memory", 0)
        check_positive(self, "gain")
        check_positive(self, "injection_gain")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"DEQTransformerConfig.{name} is {getattr(self, name)}, and must lie in [0, 1)")
        if self.normalization not in ("post", "pre"):
            raise ValueError(f'normalization is {self.normalization!r}, and must be "post" or "pre"')
        if self.memory >= self.context:
            raise ValueError(
                f"a memory of {self.memory} positions leaves no room for a segment in a context of {self.context}: "
                "give a larger context"
            )
        bounds = (0, *self.cutoffs, self.vocabulary)
        if any(low >= high for low, high in pairwise(bounds)):
            raise ValueError(
                f"cutoffs are {self.cutoffs}, and must rise strictly between 0 and the vocabulary, {self.vocabulary}"
            )
        if self.width // self.div_val ** len(self.cutoffs) < 1:
            raise ValueError(
                f"div_val {self.div_val} leaves no width for the last of {len(self.cutoffs) + 1} clusters: take a "
                "smaller one, or fewer cutoffs"
            )

    @property
    def width(self) -> int:
        """The width of the first cluster's embeddings."""
        return self.d_model if self.d_embed is None else self.d_embed


def deq_transformer_wikitext103(
    *, vocabulary: int = 267735, normalization: Literal["post", "pre"] = "post"
) -> DEQTransformerConfig:
    """The model for WikiText-103 of Bai et al. (2019, 2021) and Geng et al. (2021).

    The paper says 98M parameters. Ours has 97.7M: 67.2M in the feed-forward layer, 25.1M in the embeddings, which the
    softmax shares, 3.9M in the attention and the input's projection, 1.1M in the projections of the clusters, the rest
    in biases and the lengths of weight normalization. The paper does not give the count of each part; vocabulary,
    widths and cutoffs are those of its public settings, and so is the rule that a cluster's projection is shared,
    except the first one's.

    Args:
        vocabulary: 267735 with the end of line, as in Transformer-XL.
        normalization: ``"post"`` with a memory of 150 positions; ``"pre"``, as trained with Jacobian regularization
            there, with 300, and a little more dropout.
    """
    pre = normalization == "pre"
    return DEQTransformerConfig(
        vocabulary=vocabulary,
        d_model=700,
        heads=10,
        d_head=70,
        d_inner=48000,
        cutoffs=(20000, 40000, 200000),
        div_val=4,
        normalization=normalization,
        dropout=0.06 if pre else 0.05,
        attention_dropout=0.01 if pre else 0.0,
        weight_norm=True,
        memory=300 if pre else 150,
        context=640,
    )


def deq_transformer_small(
    *, vocabulary: int = 10000, normalization: Literal["post", "pre"] = "post"
) -> DEQTransformerConfig:
    """A small model for WikiText-2 that trains on a CPU."""
    return DEQTransformerConfig(
        vocabulary=vocabulary,
        d_model=128,
        heads=4,
        d_head=32,
        d_inner=512,
        cutoffs=(vocabulary // 5,),
        div_val=2,
        normalization=normalization,
        memory=32,
        context=256,
    )
