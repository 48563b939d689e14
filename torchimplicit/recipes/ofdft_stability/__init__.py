"""How hard a functional's densities are to find while it is trained, and what keeps that from growing."""
