"""Pictures from a quarter of their pixels, by implicit representations and their explicit twins (Huang et al. 2021)."""
