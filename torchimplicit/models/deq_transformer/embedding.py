"""Embeddings and softmax over a vocabulary in clusters: frequent tokens first, rare ones narrower."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchimplicit.models.deq_transformer.config import DEQTransformerConfig


class AdaptiveEmbedding(nn.Module):
    """Adaptive input embeddings (Baevski and Auli 2019, arXiv 1809.10853).

    Cluster c has embeddings of width ``d_embed / div_val^c``, and a projection to ``d_model`` where the widths differ.
    They start with components of size 1 after the projection.

    Args:
        config: sizes.

    Shapes: tokens, int64 of any shape, to ``[..., d_model]``.

    Raises:
        ValueError: a token outside the vocabulary.
    """

    def __init__(self, config: DEQTransformerConfig):
        super().__init__()
        self.d_model = config.d_model
        self.bounds = (0, *config.cutoffs, config.vocabulary)
        self.tables = nn.ParameterList()
        self.projections = nn.ParameterDict()
        for cluster, (low, high) in enumerate(pairwise(self.bounds)):
            width = config.width // config.div_val**cluster
            self.tables.append(nn.Parameter(torch.randn(high - low, width) * config.d_model**-0.5))
            if width != config.d_model or config.div_val > 1:
                self.projections[str(cluster)] = nn.Parameter(torch.randn(config.d_model, width) * width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.numel() and not (int(tokens.min()) >= 0 and int(tokens.max()) < self.bounds[-1]):
            raise ValueError(
                f"tokens lie in [{int(tokens.min())}, {int(tokens.max())}], and the vocabulary has {self.bounds[-1]}: "
                "were they numbered by another vocabulary?"
            )
        flat = tokens.reshape(-1)
        scale = self.d_model**0.5
        if len(self.tables) == 1:
            out = scale * self._projected(0, functional.embedding(flat, self.tables[0]))
            return out.view(*tokens.shape, self.d_model)
        out = self.tables[0].new_zeros(flat.shape[0], self.d_model)
        for cluster, (low, high) in enumerate(pairwise(self.bounds)):
            rows = ((flat >= low) & (flat < high)).nonzero()[:, 0]
            part = scale * self._projected(cluster, functional.embedding(flat[rows] - low, self.tables[cluster]))
            out = out.index_copy(0, rows, part.to(out.dtype))  # under autocast the projection is in lower precision
        return out.view(*tokens.shape, self.d_model)

    def _projected(self, cluster: int, part: Tensor) -> Tensor:
        if str(cluster) not in self.projections:
            return part
        return functional.linear(part, self.projections[str(cluster)])


class AdaptiveSoftmax(nn.Module):
    """The adaptive softmax (Grave et al. 2017, arXiv 1609.04309), with weights shared with the embeddings if tied.

    The head scores the first cluster's tokens and the further clusters; a token of one of those has the probability of
    its cluster times that within it. ``torch.nn.AdaptiveLogSoftmaxWithLoss`` is the same without sharing: its head is
    one matrix for tokens and clusters.

    Args:
        config: sizes, and whether it is tied.
        embedding: the embedding whose weights it shares.

    Shapes: hidden states ``[n, d_model]`` and targets ``[n]``, to the negative log-likelihood ``[n]``.
    """

    def __init__(self, config: DEQTransformerConfig, embedding: AdaptiveEmbedding):
        super().__init__()
        self.bounds = embedding.bounds
        source = embedding if config.tied else AdaptiveEmbedding(config)
        self.tables = nn.ParameterList(source.tables)
        # Dai et al. (2019) share the projections of all clusters but the first, whose projection is the softmax's own.
        self.projections = nn.ParameterDict(source.projections)
        if "0" in source.projections:
            first = source.projections["0"]
            self.projections["0"] = nn.Parameter(torch.randn_like(first) * first.shape[1] ** -0.5)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(len(table))) for table in source.tables)
        clusters = len(config.cutoffs)
        self.clusters = nn.Linear(config.d_model, clusters) if clusters else None

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        bounds = self.bounds
        head = self._scores(0, hidden)
        if self.clusters is not None:
            head = torch.cat((head, self.clusters(hidden)), dim=1)
        places = targets
        rows_of = []
        for cluster in range(1, len(self.tables)):
            rows = ((targets >= bounds[cluster]) & (targets < bounds[cluster + 1])).nonzero()[:, 0]
            rows_of.append(rows)
            places = places.index_fill(0, rows, bounds[1] + cluster - 1)  # the head's entry of that cluster
        loss = functional.cross_entropy(head, places, reduction="none")
        for cluster, rows in enumerate(rows_of, start=1):
            scores = self._scores(cluster, hidden[rows])
            part = functional.cross_entropy(scores, targets[rows] - bounds[cluster], reduction="none")
            loss = loss.index_add(0, rows, part)
        return loss

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """The log-probabilities of all tokens, ``[n, vocabulary]``, at hidden states ``[n, d_model]``."""
        if self.clusters is None:
            return self._scores(0, hidden).log_softmax(dim=1)
        head = torch.cat((self._scores(0, hidden), self.clusters(hidden)), dim=1).log_softmax(dim=1)
        first, clusters = head.split((self.bounds[1], len(self.tables) - 1), dim=1)
        rest = (
            clusters[:, [cluster - 1]] + self._scores(cluster, hidden).log_softmax(dim=1)
            for cluster in range(1, len(self.tables))
        )
        return torch.cat((first, *rest), dim=1)

    def _scores(self, cluster: int, hidden: Tensor) -> Tensor:
        if str(cluster) in self.projections:
            hidden = hidden @ self.projections[str(cluster)]
        return functional.linear(hidden, self.tables[cluster], self.biases[cluster])
