"""A density of orbitals in a density basis."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve

Array = NDArray[np.float64]


def constrained_fit(coulomb: Array, potential: Array, weight: Array, electrons: float) -> Array:
    """The coefficients whose error has the least Coulomb energy, among those with the right number of electrons.

    The minimum of :math:`\\tfrac12\\langle p,Jp\\rangle-\\langle b,p\\rangle` under :math:`\\langle w,p\\rangle=N`
    (Dunlap, Connolly, Sabin, J. Chem. Phys. 71, 3396 (1979)):

    .. math:: \\begin{pmatrix}J&w\\\\ w^\\top&0\\end{pmatrix}\\begin{pmatrix}p\\\\ \\lambda\\end{pmatrix}
              =\\begin{pmatrix}b\\\\ N\\end{pmatrix}

    Args:
        coulomb: J, ``[n, n]``, positive definite.
        potential: b, ``[n, k]``: the Coulomb energies of the basis functions with each of k densities.
        weight: w, ``[n]``.
        electrons: N, of each density.

    Returns:
        p, ``[n, k]``.
    """
    n, k = potential.shape
    matrix = np.zeros((n + 1, n + 1))
    matrix[:n, :n], matrix[:n, n], matrix[n, :n] = coulomb, weight, weight
    right = np.concatenate([potential, np.full((1, k), electrons)])
    found: Array = solve(matrix, right, assume_a="sym")[:n]
    return found
