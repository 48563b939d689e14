"""Adversarial training of an equilibrium classifier, the attack found by joint inference (Gurumurthy et al. 2021)."""
