"""What the table claims, tested."""

from __future__ import annotations

from statistics import fmean

from torchimplicit.recipes.fields.settings import FILTERS
from torchimplicit.recipes.fields.shape.points import LONGEST
from torchimplicit.recipes.implicit_shapes.read import Measured
from torchimplicit.recipes.implicit_shapes.rows import Row
from torchimplicit.recipes.runtime.table import Claim


def claims(found: Measured) -> list[Claim]:
    """Those for which there are runs."""
    made: list[Claim] = []
    for name in FILTERS:
        made += _level(found, Row(task="occupancy", filter=name, kind="implicit"))
    for name in FILTERS:
        made += _wrong(found, Row(task="sdf", filter=name, kind="implicit"))
    for name in FILTERS:
        made += _worse(found, Row(task="sdf", filter=name, kind="implicit"))
    return made


def _level(found: Measured, row: Row) -> list[Claim]:
    twin = row.other("explicit")
    pairs = found.pairs(row, twin, "IoU")
    if not pairs:
        return []
    better = sum(a > b for a, b in pairs)
    return [
        Claim(
            f"{row.label} comes to a larger IoU than {twin.label}, of as many parameters, in as many steps",
            f"{100 * fmean(a for a, _ in pairs):.2f} and {100 * fmean(b for _, b in pairs):.2f} %; larger in {better} "
            f"of {len(pairs)} runs",
            better == len(pairs),
        )
    ]


def _wrong(found: Measured, row: Row) -> list[Claim]:
    if found.cost is None or row.name not in found.cost.trained:
        return []
    one, begun = found.cost.trained[row.name], found.cost.begun[row.name]
    return [
        Claim(
            f"{row.label.split(',')[0]}: the one-step estimate is nearer to the exact gradient (1 - cosine) by ten "
            "times where the loss holds values alone than where it holds slopes alone",
            f"cosine {one.values:.4f} of values, {one.slopes:.4f} of slopes and {one.cosine:.4f} of both after some "
            f"steps; {begun.values:.4f}, {begun.slopes:.4f} and {begun.cosine:.4f} at the initial weights",
            10 * (1 - one.values) <= 1 - one.slopes,
        )
    ]


def _worse(found: Measured, row: Row) -> list[Claim]:
    estimate = row.other("one-step")
    losses, chamfers = (found.pairs(row, estimate, name) for name in ("loss", "chamfer"))
    if not losses:
        return []
    better = sum(a < b for a, b in losses)
    scale = 100 / LONGEST
    chamfer = (
        f"; Chamfer distances {100 * fmean(a for a, _ in chamfers):.3f} and "
        f"{100 * fmean(b for _, b in chamfers):.3f} % of the longest side"
        if chamfers
        else ""
    )
    return [
        Claim(
            f"{row.label.split(',')[0]} trained by exact gradients ends nearer to the distance than by one-step ones, "
            "in as many steps",
            f"mean absolute errors {scale * fmean(a for a, _ in losses):.3f} and "
            f"{scale * fmean(b for _, b in losses):.3f} %; smaller in {better} of {len(losses)} runs{chamfer}",
            better == len(losses),
        )
    ]
