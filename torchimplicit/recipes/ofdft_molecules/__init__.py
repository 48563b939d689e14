"""Density functionals for several molecules, tested on geometries and on molecules that they have not seen."""
