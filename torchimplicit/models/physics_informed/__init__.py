"""Functions of coordinates that solve differential equations: equilibrium models, and networks beside them.

All are stated for one point, so that weights may be shared by all points, or each point have its own: the gradient in
the latter are the rows of the Jacobian that a Gauss-Newton method needs.
"""

from torchimplicit.models.physics_informed.cell_field import CellField
from torchimplicit.models.physics_informed.equilibrium_field import EquilibriumField
from torchimplicit.models.physics_informed.field import Field
from torchimplicit.models.physics_informed.network_field import ModuleField, NetworkField

__all__ = ["CellField", "EquilibriumField", "Field", "ModuleField", "NetworkField"]
