"""What the table claims, and whether it holds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from torchimplicit.recipes.ofdft_gradients.config import MoleculeGradientsConfig
from torchimplicit.recipes.ofdft_gradients.gathered import REFERENCE, Group
from torchimplicit.recipes.ofdft_gradients.results import MoleculeResults
from torchimplicit.recipes.runtime.table import Claim

FINITE_DIFFERENCES = 1e-6
AUTOMATIC = 1e-3
ILL = 1e3
IDENTITY = 0.025
"""The largest distance that was seen in a prototype."""


def claims(groups: Sequence[Group], settings: MoleculeGradientsConfig) -> list[Claim]:
    """All of them; none without runs."""
    every = [one for group in groups for one in group.results]
    if not every:
        return []
    return [*_exact(every), *_propagated(every), *_softened(every, settings), *_solved(groups)]


def _exact(every: Sequence[MoleculeResults]) -> list[Claim]:
    worst = max(one.difference.error for one in every)
    return [
        Claim(
            f"Finite differences of the loss agree with the implicit gradient to {FINITE_DIFFERENCES:g}",
            f"at worst {worst:.1e}, over {len(every)} minima",
            worst < FINITE_DIFFERENCES,
        )
    ]


def _propagated(every: Sequence[MoleculeResults]) -> list[Claim]:
    one_sided, symmetric = ([one.slope(form) for one in every] for form in ("one_sided", "symmetric"))
    chosen = max(one.automatic["symmetric"] for one in every)
    apart = max(entry.apart for one in every for entry in one.damped)
    early = [_loosened(one, 1e-4, 1e-4) for one in every]
    late = [_loosened(one, 1e-4, 1e-8) for one in every]
    inside = [entry.error for one in every for entry in one.beyond if entry.share == 0.1]
    outside = [entry for one in every for entry in one.beyond if entry.share >= 2]
    lost = sum(entry.status != "CONVERGED" or entry.error > 0.5 for entry in outside)
    return [
        Claim(
            "The error of one-sided propagation is of first order in the nudge, that of the symmetric one of second: "
            "slopes 1 and 2, to 0.2",
            f"{min(one_sided):.2f} to {max(one_sided):.2f}, and {min(symmetric):.2f} to {max(symmetric):.2f}",
            all(abs(s - 1) < 0.2 for s in one_sided) and all(abs(s - 2) < 0.2 for s in symmetric),
        ),
        Claim(
            f"With the nudge that it chooses, symmetric propagation is within {AUTOMATIC:g} of the exact gradient",
            f"at worst {chosen:.1e}",
            chosen < AUTOMATIC,
        ),
        Claim(
            "With a weight of 1e-4, minimizing to 1e-4 spoils the gradient (more than half of it is wrong) and "
            "minimizing to 1e-8 does not (less than 5 %)",
            f"errors from {min(early):.2g} to {max(early):.2g}, and from {min(late):.1e} to {max(late):.1e}",
            min(early) > 0.5 and max(late) < 0.05,
        ),
        Claim(
            "The symmetric difference with the whole loss needs a weight below the least eigenvalue: at a tenth of it "
            "the error is below 10 %, from twice on the gradient is lost (no minimum is found, or half of it is wrong)",
            f"at a tenth {min(inside):.1e} to {max(inside):.1e}; lost in {lost} of {len(outside)}",
            max(inside) < 0.1 and lost == len(outside),
        ),
        Claim(
            f"One-sided propagation with the whole loss is damped implicit differentiation, to {IDENTITY:.1%} for "
            "weights up to 0.1",
            f"{min(entry.apart for one in every for entry in one.damped):.1e} to {apart:.1e}",
            apart < IDENTITY,
        ),
    ]


def _loosened(one: MoleculeResults, weight: float, tolerance: float) -> float:
    return next(e.symmetric for e in one.loosened if (e.nudge, e.tolerance) == (weight, tolerance))


def _softened(every: Sequence[MoleculeResults], settings: MoleculeGradientsConfig) -> list[Claim]:
    factors = sorted(settings.softness, reverse=True)
    small, below = factors.index(1e-3), factors.index(-1e-2)
    grown = [one.softened[small].norm["implicit"] for one in every]
    turned = [one.softened[below] for one in every]
    flipped = [entry.cosine["implicit"] for entry in turned]
    told = sum(entry.status["implicit"] == "SADDLE" for entry in turned)
    above = [one.softened[factors.index(1e-2)].cosine["implicit"] for one in every]
    ways = ("damped", "one-sided, whole loss")
    held = [
        (entry.cosine[way], entry.norm[way], cosine)
        for entry, cosine in zip(turned, above, strict=True)
        for way in ways
    ]
    lost = sum(
        entry.status["symmetric"] != "CONVERGED" for one in every for entry in one.softened if entry.eigenvalue < 0
    )
    count = sum(entry.eigenvalue < 0 for one in every for entry in one.softened)
    return [
        Claim(
            "As an eigenvalue goes to a thousandth of what it was, the exact gradient grows at least 50 times",
            f"{min(grown):.0f} to {max(grown):.0f} times",
            min(grown) >= 50,
        ),
        Claim(
            "Where it is slightly negative (-0.01 of what it was), the exact gradient points the other way",
            f"cosines {min(flipped):.2f} to {max(flipped):.2f}",
            max(flipped) < 0,
        ),
        Claim(
            "There the adjoint solve names the saddle",
            f"in {told} of {len(turned)}",
            told == len(turned),
        ),
        Claim(
            "There damped differentiation and one-sided propagation keep the direction (a cosine with the gradient "
            "before that is no less than the exact gradient has at +0.01) and a size below 20 times the first, with a "
            f"damping of {settings.damping:g} of the eigenvalue",
            f"cosines {min(c for c, _, _ in held):.2f} to {max(c for c, _, _ in held):.2f}, of the exact gradient at "
            f"+0.01 {min(above):.2f} to {max(above):.2f}; sizes up to {max(n for _, n, _ in held):.2g}",
            all(c > 0 and c > exact - 0.01 and n < 20 for c, n, exact in held),
        ),
        Claim(
            "At a saddle symmetric propagation finds no minimum",
            f"in {lost} of {count}",
            lost == count,
        ),
    ]


def _solved(groups: Sequence[Group]) -> list[Claim]:
    made = []
    every = [one for group in groups for one in group.results]
    ill = [one for one in every if one.point.raw_condition > ILL]
    descents = ("gradient descent, least squares", "Adam, least squares")
    if ill:
        errors = {way: [one.adjoint["raw"][way].error for one in ill] for way in descents}
        made.append(
            Claim(
                f"In raw coordinates, where the condition is above {ILL:g}, the slides' least-squares form is not "
                "solved in 2000 steps by gradient descent or by Adam (errors above 10 %)",
                "; ".join(f"{way.split(',')[0]} {min(e):.2g} to {max(e):.2g}" for way, e in errors.items()),
                min(min(e) for e in errors.values()) > 0.1,
            )
        )
    for method in ("CG", "MINRES"):
        found = [one.adjoint["overlap"][f"{method}, {REFERENCE}"] for one in every]
        plain = median(one.adjoint["raw"][method].products for one in every)
        most, error = max(one.products for one in found), max(one.error for one in found)
        made.append(
            Claim(
                f"{method} with the reference Hessian solves all of them to 1e-6 within 40 products",
                f"at most {most:.0f} products, errors up to {error:.1e}; in raw coordinates without it {plain:.0f} "
                "products (median)",
                most <= 40 and error < 1e-6,
            )
        )
    return made
