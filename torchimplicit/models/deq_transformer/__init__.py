"""The DEQ transformer: a decoder with one weight-tied layer, iterated to its fixed point (arXiv 1909.01377)."""

from torchimplicit.models.deq_transformer.attention import RelativeAttention
from torchimplicit.models.deq_transformer.by_token import TokenSolution, solve_by_token
from torchimplicit.models.deq_transformer.cell import DecoderCell, Injection, Memory
from torchimplicit.models.deq_transformer.config import (
    DEQTransformerConfig,
    deq_transformer_small,
    deq_transformer_wikitext103,
)
from torchimplicit.models.deq_transformer.embedding import AdaptiveEmbedding, AdaptiveSoftmax
from torchimplicit.models.deq_transformer.explicit import ExplicitTransformer
from torchimplicit.models.deq_transformer.generation import Generated, generate
from torchimplicit.models.deq_transformer.language_model import LanguageModel
from torchimplicit.models.deq_transformer.model import DEQTransformer

__all__ = [
    "AdaptiveEmbedding",
    "AdaptiveSoftmax",
    "DEQTransformer",
    "DEQTransformerConfig",
    "DecoderCell",
    "ExplicitTransformer",
    "Generated",
    "Injection",
    "LanguageModel",
    "Memory",
    "RelativeAttention",
    "TokenSolution",
    "deq_transformer_small",
    "deq_transformer_wikitext103",
    "generate",
    "solve_by_token",
]
