"""Joint inference and input optimization, and its tables (Gurumurthy et al. 2021)."""
