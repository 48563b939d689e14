"""Models of the field, built on :class:`torchimplicit.nn.Equilibrium`. They need torch alone."""

from torchimplicit.models.context_equilibrium import ContextEquilibrium, ContextEquilibriumConfig, ModulatedCell
from torchimplicit.models.conv_deq import ConvDEQClassifier, ResidualCell
from torchimplicit.models.decoders import (
    ConvDecoderCell,
    DecoderCell,
    EquilibriumDecoder,
    conv_decoder,
    mlp_decoder,
)
from torchimplicit.models.deq_transformer import (
    DEQTransformer,
    DEQTransformerConfig,
    deq_transformer_small,
    deq_transformer_wikitext103,
)
from torchimplicit.models.equilibrium_classifier import EquilibriumClassifier, EquilibriumClassifierConfig, TanhCell
from torchimplicit.models.ignn import (
    IGNN,
    Adjacency,
    IdentityStart,
    IGNNCell,
    IGNNConfig,
    IGNNLayer,
    InfinityNormBall,
    UniformStart,
    ignn_chains,
    ignn_ppi,
    ignn_tu,
    project_rows,
)
from torchimplicit.models.mdeq import MDEQ, MDEQCell, MDEQConfig, mdeq_imagenet, mdeq_large, mdeq_small, mdeq_tiny
from torchimplicit.models.multiscale_decoder import MultiscaleDecoderCell, MultiscaleHead, multiscale_decoder
from torchimplicit.models.physics_informed import CellField, EquilibriumField, Field, ModuleField, NetworkField
from torchimplicit.models.representations import (
    MFN,
    SIREN,
    ExplicitRepresentation,
    GaborFilter,
    ImplicitMFN,
    ImplicitRepresentation,
    ImplicitSIREN,
)

__all__ = [
    "IGNN",
    "MDEQ",
    "MFN",
    "SIREN",
    "Adjacency",
    "CellField",
    "ContextEquilibrium",
    "ContextEquilibriumConfig",
    "ConvDEQClassifier",
    "ConvDecoderCell",
    "DEQTransformer",
    "DEQTransformerConfig",
    "DecoderCell",
    "EquilibriumClassifier",
    "EquilibriumClassifierConfig",
    "EquilibriumDecoder",
    "EquilibriumField",
    "ExplicitRepresentation",
    "Field",
    "GaborFilter",
    "IGNNCell",
    "IGNNConfig",
    "IGNNLayer",
    "IdentityStart",
    "ImplicitMFN",
    "ImplicitRepresentation",
    "ImplicitSIREN",
    "InfinityNormBall",
    "MDEQCell",
    "MDEQConfig",
    "ModulatedCell",
    "ModuleField",
    "MultiscaleDecoderCell",
    "MultiscaleHead",
    "NetworkField",
    "ResidualCell",
    "TanhCell",
    "UniformStart",
    "conv_decoder",
    "deq_transformer_small",
    "deq_transformer_wikitext103",
    "ignn_chains",
    "ignn_ppi",
    "ignn_tu",
    "mdeq_imagenet",
    "mdeq_large",
    "mdeq_small",
    "mdeq_tiny",
    "mlp_decoder",
    "multiscale_decoder",
    "project_rows",
]
