"""What was aimed at, and what came out."""

from __future__ import annotations

from statistics import fmean

from torchimplicit.recipes.jiio_adversarial.config import AttacksConfig
from torchimplicit.recipes.jiio_adversarial.gathered import Found, ratio
from torchimplicit.recipes.jiio_adversarial.measure import CLEAN, strongest
from torchimplicit.recipes.jiio_adversarial.rows import ROWS
from torchimplicit.recipes.runtime.table import Claim
from torchimplicit.recipes.training.results import Results


def claims(kind: AttacksConfig, found: Found, trained: dict[tuple[str, int], Results]) -> list[Claim]:
    """The attacks' strength in their time, then what training against them gives."""
    made = []
    rival = strongest(kind, "PGD")
    for row in ("clean", "pgd", "jiio"):
        if not any(own == row for own, _ in found):
            continue
        names = [f"JIIO-{steps}" for steps in sorted(kind.jiio_steps)]
        measured = [
            (name, ratio(found, row, name, rival, "cross_entropy"), ratio(found, row, rival, name, "seconds"))
            for name in names
        ]
        words = "; ".join(f"{name} has {strong:.3f} of it, {fast:.1f} times as fast" for name, strong, fast in measured)
        made.append(
            Claim(
                f"On the model trained on {ROWS[row][0]}, JIIO attacks with at least 0.97 of the cross-entropy of "
                f"{rival}, at least 3 times as fast",
                words,
                any(strong >= 0.97 and fast >= 3 for _, strong, fast in measured),
            )
        )
        strong = [one for one in measured if one[1] >= 0.97]
        short = [
            (name, fast)
            for steps in sorted(kind.pgd_steps)
            if ratio(found, row, name := f"PGD-{steps}", rival, "cross_entropy") >= 0.97
            for fast in [ratio(found, row, rival, name, "seconds")]
        ]
        if strong and short:
            made.append(
                Claim(
                    "On the same model, the fastest JIIO of that strength is faster than the fastest PGD of that "
                    "strength, those of few and long steps included",
                    f"{short[0][0]} is {short[0][1]:.1f} times as fast as {rival}, and {strong[0][0]} "
                    f"{strong[0][2]:.1f} times",
                    strong[0][2] > short[0][1],
                )
            )
    both = [seed for row, seed in found if row == "pgd" and ("jiio", seed) in found]
    if both:
        differences = {
            attack: 100 * fmean(found["jiio", s][attack].accuracy - found["pgd", s][attack].accuracy for s in both)
            for attack in (CLEAN, rival, strongest(kind, "JIIO"))
        }
        costs = {
            row: fmean(c.seconds for s in both if (c := trained[row, s].costs) is not None) for row in ("pgd", "jiio")
        }
        made.append(
            Claim(
                "Trained against JIIO, the model is as robust as against PGD-10, to a point, in less time",
                ", ".join(f"{attack} {value:+.1f} points" for attack, value in differences.items())
                + f"; a step takes {costs['pgd'] / costs['jiio']:.1f} times less time",
                min(differences.values()) >= -1 and costs["jiio"] < costs["pgd"],
            )
        )
    return made
