"""Joint inference and input optimization (Gurumurthy et al. 2021): recipes and tables."""
