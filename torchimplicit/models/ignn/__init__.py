"""Implicit graph neural networks (Gu et al. 2020, arXiv 2009.06211)."""

from torchimplicit.models.ignn.adjacency import Adjacency
from torchimplicit.models.ignn.ball import InfinityNormBall, project_rows
from torchimplicit.models.ignn.config import IGNNConfig, ignn_chains, ignn_ppi, ignn_tu
from torchimplicit.models.ignn.layer import IGNNCell, IGNNLayer
from torchimplicit.models.ignn.model import IGNN
from torchimplicit.models.ignn.start import IdentityStart, Start, UniformStart

__all__ = [
    "IGNN",
    "Adjacency",
    "IGNNCell",
    "IGNNConfig",
    "IGNNLayer",
    "IdentityStart",
    "InfinityNormBall",
    "Start",
    "UniformStart",
    "ignn_chains",
    "ignn_ppi",
    "ignn_tu",
    "project_rows",
]
