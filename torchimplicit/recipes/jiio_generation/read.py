"""The figures of the table, from its runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from torchimplicit.recipes.jiio.curves import JOINT, Curves
from torchimplicit.recipes.jiio.runner import Generated, read_curves, read_pictures
from torchimplicit.recipes.jiio.runner import read as read_generated
from torchimplicit.recipes.jiio_generation.config import JiioGenerationConfig
from torchimplicit.recipes.jiio_generation.jobs import MODELS, SIZES
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.training.results import Results


@dataclass(frozen=True)
class Found:
    """Everything.

    Attributes:
        curves: of each decoder that is timed, one a seed.
        generated: of each model, one a seed.
        mse: of each model, the test reconstructions' after an exact solve, one a seed.
        pictures: of each model, of the first seed that has some.
        missing: runs that did not come to an end.
        raw: figures of every run.
    """

    curves: dict[str, list[Curves]]
    generated: dict[str, list[Generated]]
    mse: dict[str, list[float]]
    pictures: dict[str, dict[str, list[Tensor]]]
    missing: list[str]
    raw: dict[str, Any]


def read(config: JiioGenerationConfig, runs: Mapping[str, Run]) -> Found:
    """What the runs have left."""
    found = Found({m: [] for m in SIZES}, {m: [] for m in MODELS}, {m: [] for m in MODELS}, {}, [], {})
    for seed in config.plan.all_seeds:
        for model in MODELS:
            name = f"{model}-{seed}"
            run = runs.get(name)
            results = Results.of(run) if run is not None and (run.path / "results.json").is_file() else None
            if run is None or results is None or results.state != "complete" or results.test is None:
                found.missing.append(name)
                continue
            generated, measured, pictures = read_generated(run), read_curves(run), read_pictures(run)
            found.mse[model].append(results.test.figures["mse"])
            if generated is not None:
                found.generated[model].append(generated)
            if measured is not None:
                found.curves[model].append(measured)
            if pictures is not None:
                found.pictures.setdefault(model, pictures)
            found.raw[name] = {
                "test": results.test.figures,
                "seconds": results.seconds,
                "generated": None if generated is None else asdict(generated),
                "curves": None if measured is None else asdict(measured),
            }
    return found


def at(one: Curves, method: str, steps: int) -> tuple[float, float]:
    """Seconds and loss."""
    return next((p.seconds, p.loss) for p in one.points if (p.method, p.steps) == (method, steps))


@dataclass(frozen=True)
class Overtaking:
    """The cheapest joint solve that is at least as good as a nested one.

    Attributes:
        steps, seconds: of it.
        ratio: the nested one's time over its.
    """

    steps: int
    seconds: float
    ratio: float


def overtaking(one: Curves, method: str, steps: int) -> Overtaking | None:
    """``None``: no joint solve that was measured is as good."""
    seconds, loss = at(one, method, steps)
    good = [p for p in one.points if p.method == JOINT and p.loss <= loss]
    if not good:
        return None
    best = min(good, key=lambda p: p.seconds)
    return Overtaking(best.steps, best.seconds, seconds / best.seconds)
