"""The architecture of an IGNN, and the published ones by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, final

from torchimplicit.models.ignn.layer import Activation
from torchimplicit.models.ignn.start import IdentityStart, Start, UniformStart
from torchimplicit.validation import check_count, check_positive, check_type


@final
@dataclass(frozen=True, kw_only=True)
class IGNNConfig:
    """The architecture of an :class:`IGNN`.

    Args:
        features: features of each node.
        classes: scores per graph (``pool="add"``) or per node.
        widths: features after each implicit layer.
        kappa, perron, activation, bias, start: settings of every layer, see :class:`IGNNLayer`.
        skips: whether a linear map of each layer's input is added to its output, and the sum goes through an ELU
            (after the last layer only where a head follows).
        pool: ``"add"``, the sum over a graph's nodes; or ``"none"``, scores per node.
        head: two linear maps with a ReLU between (``"mlp"``), one without bias (``"linear"``), or ``"none"``: the last
            layer gives the scores.
        normalize: whether each node's features are brought to length one before the head. The
            features at the end of a long chain are tiny; this makes them visible to the loss.
        dropout: before the last linear map of the head.
    """

    features: int
    classes: int
    widths: tuple[int, ...] = (64, 64, 64)
    kappa: float = 0.9
    perron: float = 1.0
    activation: Activation = "relu"
    bias: bool = False
    start: Start = field(default_factory=UniformStart)
    skips: bool = False
    pool: Literal["add", "none"] = "none"
    head: Literal["mlp", "linear", "none"] = "mlp"
    normalize: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_count(self, "features")
        check_count(self, "classes")
        check_positive(self, "perron")
        check_type(self, "start", Start)
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"IGNNConfig.widths is {self.widths}, and must hold at least one positive width")
        if not 0 < self.kappa < 1:
            raise ValueError(f"IGNNConfig.kappa is {self.kappa}, and must lie in (0, 1)")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"IGNNConfig.dropout is {self.dropout}, and must lie in [0, 1)")
        for name, known in (("activation", ("relu", "elu")), ("pool", ("add", "none")), ("head", _HEADS)):
            if getattr(self, name) not in known:
                raise ValueError(f"IGNNConfig.{name} is {getattr(self, name)!r}, and must be one of {known}")
        if self.head == "none" and self.widths[-1] != self.classes:
            raise ValueError(
                f"IGNNConfig: without a head the last width is the number of classes, and they are {self.widths[-1]} "
                f"and {self.classes}"
            )


_HEADS = ("mlp", "linear", "none")


def ignn_tu(features: int, classes: int = 2) -> IGNNConfig:
    """Graph classification on the TU sets: three layers of 64, sum over the nodes, two-layer perceptron."""
    return IGNNConfig(features=features, classes=classes, pool="add", dropout=0.5)


def ignn_ppi(features: int = 50, classes: int = 121) -> IGNNConfig:
    """Node classification on PPI: five layers with linear skips and ELUs between them, the last one giving scores."""
    return IGNNConfig(
        features=features, classes=classes, widths=(1024, 512, 512, 256, classes), kappa=0.98, skips=True, head="none"
    )


def ignn_chains(features: int = 100, classes: int = 2, start: Start | None = None) -> IGNNConfig:
    """Node classification on chains: one layer of 16. ``start`` is :class:`IdentityStart` unless given, without which
    chains of more than some tens of nodes are not learned."""
    return IGNNConfig(
        features=features,
        classes=classes,
        widths=(16,),
        head="linear",
        normalize=True,
        dropout=0.5,
        start=start or IdentityStart(),
    )
