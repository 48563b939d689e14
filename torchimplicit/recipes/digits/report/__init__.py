"""The pictures and the page of a run."""

from torchimplicit.recipes.digits.report.write import write_report

__all__ = ["write_report"]
