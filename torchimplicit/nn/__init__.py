"""Modules: the equilibrium layer, and what its cells are made of."""

from torchimplicit.nn.dropout import VariationalDropout
from torchimplicit.nn.equilibrium import Equilibrium
from torchimplicit.nn.normalization import spectral_norm, weight_norm
from torchimplicit.nn.warm_start import WarmStart

__all__ = ["Equilibrium", "VariationalDropout", "WarmStart", "spectral_norm", "weight_norm"]
