"""Multiscale deep equilibrium models (Bai, Koltun and Kolter 2020, arXiv 2006.08656)."""

from torchimplicit.models.mdeq.cell import MDEQCell
from torchimplicit.models.mdeq.config import MDEQConfig, mdeq_imagenet, mdeq_large, mdeq_small, mdeq_tiny
from torchimplicit.models.mdeq.model import MDEQ

__all__ = ["MDEQ", "MDEQCell", "MDEQConfig", "mdeq_imagenet", "mdeq_large", "mdeq_small", "mdeq_tiny"]
