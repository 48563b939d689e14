"""The sizes of the smallest DEQ transformer that has all its parts."""

from __future__ import annotations

from torchimplicit.models import DEQTransformerConfig

TINY = DEQTransformerConfig(
    vocabulary=23, d_model=12, heads=3, d_head=4, d_inner=16, cutoffs=(8, 15), div_val=2, memory=5, context=24
)
