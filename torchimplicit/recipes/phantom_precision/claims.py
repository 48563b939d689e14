"""The statements that the table tests."""

from __future__ import annotations

from itertools import pairwise

from torchimplicit.recipes.phantom_precision.gathered import GRADIENTS, TRAINED, WEIGHTS, Gathered, mean
from torchimplicit.recipes.phantom_precision.layer import LayerResults
from torchimplicit.recipes.runtime.table import Claim

ROUNDING = 1e-9
"""Cosines that differ by less are the same."""


def claims(found: Gathered) -> list[Claim]:
    """Those that can be tested with the runs that are there."""
    layers = [one for weight in WEIGHTS for one in found.layers[weight]]
    tested: list[Claim] = []
    if layers:
        tested += _of_layers(layers, found)
    for gradient in GRADIENTS:
        if found.trainings[gradient]:
            tested += _of_training(found, gradient)
    return tested


def _of_layers(layers: list[LayerResults], found: Gathered) -> list[Claim]:
    residual, agreement = max(one.residual for one in layers), min(one.agreement for one in layers)
    rising, by_damping = [], []
    for weight in WEIGHTS:
        table: dict[tuple[str, float], dict[int, list[float]]] = {}
        for one in found.layers[weight]:
            for p in one.grid:
                table.setdefault((p.estimator, p.damping), {}).setdefault(p.steps, []).append(p.cosine)
        curves = {key: [mean(values) for values in by_k.values()] for key, by_k in table.items()}
        rising += [later - earlier for curve in curves.values() for earlier, later in pairwise(curve)]
        for name in ("UPG", "NPG"):
            ordered = [curves[key] for key in sorted(curves) if key[0] == name]
            by_damping += [
                b - a for small, large in pairwise(ordered) for a, b in zip(small[1:], large[1:], strict=True)
            ]
    held = [(a.error, a.asked) for one in layers for a in one.adaptive]
    ratios = [one.unbiased.mean_error / (one.unbiased.error / one.unbiased.draws**0.5) for one in layers]
    ratio = mean(value**2 for value in ratios) ** 0.5
    return [
        Claim(
            "The fixed-point iterations reach a relative residual below 1e-5 on the layers",
            f"at most {residual:.1g}",
            residual < 1e-5,
        ),
        Claim(
            "Backpropagation through the iterations and implicit differentiation agree to a cosine above 0.9999",
            f"at least 1 − {1 - agreement:.1g}",
            agreement > 0.9999,
        ),
        Claim(
            "The cosine rises with k for every λ, for UPG and NPG (Fig. 1)",
            f"{sum(step > -ROUNDING for step in rising)} of {len(rising)} steps of the grid do",
            all(step > -ROUNDING for step in rising),
        ),
        Claim(
            "It rises more slowly for small λ (Fig. 1)",
            f"at {sum(step > -ROUNDING for step in by_damping)} of {len(by_damping)} points a larger λ is at least as "
            "precise",
            all(step > -ROUNDING for step in by_damping),
        ),
        Claim(
            "The adaptive phantom gradient keeps every sample's error below what is asked for",
            f"the largest share of it that is used is {max(error / asked for error, asked in held):.2f}",
            all(error <= asked for error, asked in held),
        ),
        Claim(
            "The unbiased series has no bias that its noise would not explain",
            f"the mean's error is {ratio:.2f} standard errors (root mean square over the layers)",
            ratio < 1.5,
        ),
    ]


def _of_training(found: Gathered, gradient: str) -> list[Claim]:
    looks, late, name = found.looks(gradient), found.looks(gradient, late=True), TRAINED[gradient]

    def cosine(estimator: str) -> float:
        return mean(look.beside[estimator]["cosine"] for look in late)

    upg = [look.beside["upg-5-0.5"]["cosine"] for look in looks]
    terms = [cosine(estimator) for estimator in ("npg-2-0.5", "npg-5-0.5", "npg-9-0.5")]
    adaptive = [look.beside["adaptive-0.1"]["adjoint_residual"] for look in late]
    return [
        Claim(
            f"UPG(5, 0.5) is an ascent direction all along the training, {name}",
            f"at {sum(value > 0 for value in upg)} of {len(upg)} looks; its cosine is {mean(upg):.2f} on average and "
            f"{min(upg):.2f} at least",
            all(value > 0 for value in upg),
        ),
        Claim(
            f"More terms are more precise in the second half, {name}",
            "NPG(k, 0.5) with k = 2, 5, 9: " + ", ".join(f"{value:.3f}" for value in terms),
            all(a < b for a, b in pairwise(terms)),
        ),
        Claim(
            f"The adaptive phantom gradient keeps the batch's residual at 0.1 in the second half, {name}",
            f"at {sum(value <= 0.1 for value in adaptive)} of {len(adaptive)} looks, within 60 steps; at most "
            f"{max(adaptive):.2f}",
            all(value <= 0.1 for value in adaptive),
        ),
    ]
