"""Table 4 of Geng et al. 2021 on COX2 and PROTEINS, and chains of growing length."""
