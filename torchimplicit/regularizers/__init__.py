"""Terms that are added to a loss to keep an equilibrium model well behaved."""

from torchimplicit.regularizers.consistency import consistency
from torchimplicit.regularizers.correction import fixed_point_correction
from torchimplicit.regularizers.jacobian import jacobian_frobenius
from torchimplicit.regularizers.spectral import spectral_penalty

__all__ = ["consistency", "fixed_point_correction", "jacobian_frobenius", "spectral_penalty"]
