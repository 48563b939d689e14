"""What was aimed at, and what came out."""

from __future__ import annotations

from statistics import fmean

from torchimplicit.recipes.ofdft_molecules.gathered import Group
from torchimplicit.recipes.ofdft_runs import ratio, shown
from torchimplicit.recipes.orbital_free.measure import Quality, summarized
from torchimplicit.recipes.runtime.table import Claim

LOWERED, SHARE = 0.4, 0.8
"""The aims: the training molecules' L over its start, and the test molecules better than the superposition of atoms."""


def claims(groups: list[Group]) -> list[Claim]:
    """The aims, then what the rows are there to compare."""
    there = {group.name: group for group in groups}
    made = []
    for name in ("gauss-newton", "energy", "qm9"):
        if group := there.get(name):
            made += [_fitted(group), _tested(group)]
    if "gauss-newton" in there:
        for name in ("l-bfgs", "adam"):
            if name in there:
                made.append(_ahead(there["gauss-newton"], there[name]))
    if "gauss-newton" in there and "energy" in there:
        made.append(_energies(there["gauss-newton"], there["energy"]))
    return made


def better(found: list[Quality]) -> float:
    """The share that is better than the superposition of atoms by L and by L1."""
    return fmean(one.better for one in found)


def _fitted(group: Group) -> Claim:
    ratios = group.each(ratio)
    return Claim(
        f"{group.row.label}: the training molecules' L falls to at most {LOWERED:g} of its start with every seed",
        f"to {shown(max(ratios), 3)} at worst, {shown(fmean(ratios), 3)} in the mean of {len(ratios)} seeds",
        max(ratios) <= LOWERED,
    )


def _tested(group: Group) -> Claim:
    found = group.tested()
    what = "molecules that training has not seen" if group.row.qm9 else "test geometries"
    return Claim(
        f"{group.row.label}: L and L1 per electron are both below those of the superposition of atoms (MINAO) on at "
        f"least {100 * SHARE:.0f} % of the {what}",
        f"on {100 * better(found):.0f} % of {len(found)}; L below on "
        f"{100 * fmean(one.loss < one.guess_loss for one in found):.0f} %, L1 on "
        f"{100 * fmean(one.l1 < one.guess_l1 for one in found):.0f} %",
        better(found) >= SHARE,
    )


def _ahead(newton: Group, other: Group) -> Claim:
    """The loss that is trained, in the same time."""
    seeds = [seed for seed in newton.results if seed in other.results]
    pairs = [(newton.results[seed].looks[-1].loss, other.results[seed].looks[-1].loss) for seed in seeds]
    told = ", ".join(f"{shown(1e3 * a, 3)} against {shown(1e3 * b, 3)}" for a, b in pairs)
    return Claim(
        f"Gauss–Newton reaches a lower training loss than {other.row.label} in the same time, with every seed",
        f"10³ times the loss: {told or 'no seed of both'}",
        bool(pairs) and all(a < b for a, b in pairs),
    )


def _energies(plain: Group, energy: Group) -> Claim:
    """On the test geometries."""
    first, second = (summarized(group.tested()) for group in (plain, energy))
    return Claim(
        "The energy term lowers the test geometries' energy error tenfold, and their L by no more than a tenth worse",
        f"energy {shown(1e3 * first.energy_error, 3)} to {shown(1e3 * second.energy_error, 3)} mHa, L "
        f"{shown(1e3 * first.loss, 3)} to {shown(1e3 * second.loss, 3)} (10⁻³)",
        second.energy_error <= 0.1 * first.energy_error and second.loss <= 1.1 * first.loss,
    )
