"""Modules: the equilibrium layer, and what its cells are made of."""

from torchimplicit.nn.apply_norm import apply_norm, remove_norm
from torchimplicit.nn.best_of import BestOf, Vote, best_of, least_residual
from torchimplicit.nn.budget import Budget
from torchimplicit.nn.convert import convert_state_dict
from torchimplicit.nn.dropout import VariationalDropout, dropout_masks
from torchimplicit.nn.equilibrium import Equilibrium
from torchimplicit.nn.learned_start import LearnedStart
from torchimplicit.nn.normalization import spectral_norm, weight_norm
from torchimplicit.nn.per_solve import per_solve
from torchimplicit.nn.warm_start import WarmStart

__all__ = [
    "BestOf",
    "Budget",
    "Equilibrium",
    "LearnedStart",
    "VariationalDropout",
    "Vote",
    "WarmStart",
    "apply_norm",
    "best_of",
    "convert_state_dict",
    "dropout_masks",
    "least_residual",
    "per_solve",
    "remove_norm",
    "spectral_norm",
    "weight_norm",
]
