"""The periodic table: symbols and nuclear charges."""

from __future__ import annotations

_PERIODS = """
H He
Li Be B C N O F Ne
Na Mg Al Si P S Cl Ar
K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr
Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe
Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn
Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og
"""

SYMBOLS = tuple(_PERIODS.split())
"""In the order of their nuclear charges, from 1 on."""

CHARGES = {symbol: charge for charge, symbol in enumerate(SYMBOLS, start=1)}
"""Nuclear charge by symbol."""

HEAVIEST = CHARGES["Kr"]
"""The last element that is taken. Beyond it the usual orbital bases replace the inner electrons by an effective core
potential: the density would lack them, and the nuclei would not attract as point charges."""


def symbol(charge: int) -> str:
    """The element with this nuclear charge."""
    return SYMBOLS[charge - 1]
