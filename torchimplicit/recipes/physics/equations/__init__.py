"""The equations by name, each in a file of its own."""

from torchimplicit.recipes.physics.equations.base import Condition, Equation, Fields
from torchimplicit.recipes.physics.equations.burgers import Burgers
from torchimplicit.recipes.physics.equations.four_tanks import FourTanks
from torchimplicit.recipes.physics.equations.helmholtz import Helmholtz
from torchimplicit.recipes.physics.equations.van_der_pol import VanDerPol

EQUATIONS: dict[str, Equation] = {
    "van-der-pol": VanDerPol(),
    "four-tanks": FourTanks(),
    "burgers": Burgers(),
    "helmholtz": Helmholtz(),
}
"""Every equation."""

__all__ = ["EQUATIONS", "Burgers", "Condition", "Equation", "Fields", "FourTanks", "Helmholtz", "VanDerPol"]
