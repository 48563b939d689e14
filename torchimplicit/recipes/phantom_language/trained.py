"""The runs of one row of the table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from torchimplicit.recipes.phantom_language.config import Row
from torchimplicit.recipes.training.results import Results


@dataclass(frozen=True)
class Trained:
    """A row's runs.

    Attributes:
        row: what it is.
        results: of its seeds, those that there are.
        step_seconds: of a training step, in turn with the others'; ``None`` where it was not measured.
        radius: see :class:`Measured`; likewise.
    """

    row: Row
    results: list[Results]
    step_seconds: float | None
    radius: float | None = None

    @property
    def tested(self) -> list[float]:
        """Test perplexities at the best validations."""
        return [r.test.figures["perplexity"] for r in self.results if r.test is not None]

    @property
    def seconds(self) -> float | None:
        """Of a whole training."""
        if self.step_seconds is None or not self.results:
            return None
        return self.step_seconds * max(r.steps for r in self.results)

    def cost(self, name: str) -> list[float]:
        """A figure of the steps, by seed."""
        return [getattr(r.costs, name) for r in self.results if r.costs is not None]

    def validated_after(self, seconds: float) -> list[float]:
        """Validation perplexities after so much training, between two validations along a straight line in the
        logarithm; of seeds for which it lies before the first, nothing."""
        found = []
        for r in self.results:
            steps = seconds / self.step_seconds if self.step_seconds else math.nan
            points = [(v.step, math.log(v.figures["perplexity"])) for v in r.validations]
            for (low, one), (high, other) in pairwise(points):
                if low <= steps <= high * (1 + 1e-9):
                    found.append(math.exp(one + (other - one) * (steps - low) / (high - low)))
                    break
        return found
