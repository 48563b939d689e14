"""Modules: the equilibrium layer, and what its cells are made of."""

from torchimplicit.nn.dropout import VariationalDropout
from torchimplicit.nn.equilibrium import Equilibrium
from torchimplicit.nn.normalization import per_solve, spectral_norm, weight_norm
from torchimplicit.nn.warm_start import WarmStart

__all__ = ["Equilibrium", "VariationalDropout", "WarmStart", "per_solve", "spectral_norm", "weight_norm"]
