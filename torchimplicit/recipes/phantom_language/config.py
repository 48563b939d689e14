"""The settings of the table, and its rows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from torchimplicit.recipes.language.config import LanguageConfig, wikitext2, wikitext103
from torchimplicit.recipes.options import positive
from torchimplicit.recipes.runtime.table import Plan
from torchimplicit.recipes.training.settings import Machine


@dataclass(frozen=True)
class Row:
    """One way to train.

    Attributes:
        label: for people.
        normalization: see :class:`DEQTransformerConfig`.
        gradient: the estimator.
        jacobian: whether the Jacobian is regularized.
        perplexity, speed: published, of the test on WikiText-103, and of training against the first row.
    """

    label: str
    normalization: Literal["post", "pre"]
    gradient: Literal["implicit", "unrolled-phantom"]
    jacobian: bool
    perplexity: float | None = None
    speed: float | None = None


ROWS = {
    "post-implicit": Row("PostLN, implicit", "post", "implicit", False, 24.0, 1.0),
    "post-phantom": Row("PostLN, UPG(5, 0.8)", "post", "unrolled-phantom", False, 25.7, 1.7),
    "pre-jacobian-implicit": Row("PreLN + JR, implicit", "pre", "implicit", True, 24.5, 1.7),
    "pre-jacobian-phantom": Row("PreLN + JR, UPG(5, 0.8)", "pre", "unrolled-phantom", True, 24.4, 2.2),
    "pre-implicit": Row("PreLN, implicit", "pre", "implicit", False),
    "pre-phantom": Row("PreLN, UPG(5, 0.8)", "pre", "unrolled-phantom", False),
}
"""JR is Jacobian regularization with weight 2.0 and probability 0.4, as published."""


@dataclass(frozen=True, kw_only=True)
class PhantomLanguage:
    """A language model with implicit and phantom gradients, with and without Jacobian regularization."""

    plan: Plan = field(default_factory=Plan)
    machine: Machine = field(default_factory=Machine)

    data_dir: Path | None = None
    """The folder with wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens: WikiText-2, and WikiText-103 with
    --scale paper. Downloaded by default."""

    steps: int | None = None
    """Of every run; by default 400, and 300000 with --scale paper."""

    repeats: int = 8
    """How often every kind of step is timed."""

    def __post_init__(self) -> None:
        positive(self, "steps", "repeats")


def default() -> PhantomLanguage:
    """The table on a CPU."""
    return PhantomLanguage()


def language(config: PhantomLanguage, row: Row, seed: int) -> LanguageConfig:
    """The settings of one run."""
    paper = config.plan.scale == "paper"
    base = wikitext103(row.normalization) if paper else wikitext2()
    steps = config.steps or (base.optimization.steps if paper else 400)
    optimization = replace(base.optimization, seed=seed, steps=steps)
    if not paper:
        optimization = replace(optimization, validate_every=max(1, steps // 5))
        base = replace(base, normalization=row.normalization, validation_tokens=10000, test_tokens=30000)
    return replace(
        base,
        data_dir=config.data_dir,
        optimization=optimization,
        equilibria=replace(
            base.equilibria,
            gradient=row.gradient,
            jacobian_weight=2.0 if row.jacobian else 0.0,
            jacobian_probability=0.4,
        ),
        machine=config.machine,
    )
