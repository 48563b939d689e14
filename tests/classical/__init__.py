"""Classical test problems, and the defaults held to them."""
