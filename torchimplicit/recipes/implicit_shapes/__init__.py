"""A mesh by implicit representations and their explicit twins: occupancy, and distances with exact slopes."""
