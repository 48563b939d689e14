"""Inverse problems by joint inference: trained with the exact gradient, a first-order one, or on clean images."""
