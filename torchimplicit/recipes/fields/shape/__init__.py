"""Shapes as fields: the inside of a mesh, or the signed distance to it, and the surface that a field describes."""
