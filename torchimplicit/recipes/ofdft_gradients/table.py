"""The table ``ofdft-gradients``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchimplicit.recipes.ofdft_gradients.claims import claims
from torchimplicit.recipes.ofdft_gradients.config import STATES, MoleculeGradientsConfig, TableConfig
from torchimplicit.recipes.ofdft_gradients.drawing import drawings
from torchimplicit.recipes.ofdft_gradients.gathered import Group, gathered, jobs, one
from torchimplicit.recipes.ofdft_gradients.optimum import LEARNING_RATE, SPREAD, WEIZSAECKER
from torchimplicit.recipes.ofdft_gradients.sheets import sheets
from torchimplicit.recipes.ofdft_gradients.softening import FELT
from torchimplicit.recipes.plain import to_plain
from torchimplicit.recipes.reproduce.runner import Reproduction
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.runtime.table import Summary


def summarize(config: TableConfig, runs: dict[str, Run]) -> Summary:
    """See :class:`~torchimplicit.recipes.runtime.table.Summary`."""
    groups = gathered(config, runs)
    settings = one(config, config.molecules[0], "fitted", 0)
    return Summary(
        title="Gradients through the minimum of a density functional",
        source="Slides on fine-tuning density functionals under an electron-number constraint (Adamowicz), which "
        "report that the adjoint solve failed, without figures; the figures here are ours.",
        protocol=_protocol(config, settings),
        sheets=sheets(groups, settings) if groups else [],
        claims=claims(groups, settings),
        drawings=drawings(groups, settings),
        notes=_notes(groups, [job.name for job in jobs(config) if job.name not in runs]),
        runs={
            f"{group.name}, {i}": _short(to_plain(found)) for group in groups for i, found in enumerate(group.results)
        },
    )


TABLE = Reproduction(jobs, summarize)


def _protocol(config: TableConfig, settings: MoleculeGradientsConfig) -> str:
    functionals = "; ".join(
        f"{state}: {WEIZSAECKER[state]:g} times the von Weizsäcker energy, last layer of deviation {SPREAD[state]:g}"
        + (f", then {settings.training_steps} steps of Adam at {LEARNING_RATE:g}" if state == "trained" else "")
        for state in STATES
    )
    return (
        f"{', '.join(config.molecules)} with nuclei displaced at random by {config.sigma:g} angstrom, another geometry "
        f"and other weights for each of {config.plan.seeds} seeds; Kohn-Sham densities (LDA, def2-SVP) in an "
        f"even-tempered basis, grid level {config.grid}. Thomas-Fermi, von Weizsäcker and LDA with a network as "
        f"enhancement factor and a linear term that is fitted; {functionals}. The loss is half the squared distance "
        "to the Kohn-Sham density; gradients are in all parameters. Minimizations: L-BFGS, preconditioned by a "
        f"reference Hessian, in coordinates of the overlap, to a projected gradient of {settings.tolerance:g}. The "
        "exact gradient: implicit, by the dense adjoint system. Double precision, one thread."
    )


def _notes(groups: Sequence[Group], missing: Sequence[str]) -> list[str]:
    notes = [
        "An eigenvalue is moved by taking half its change times the squared coordinate along its eigenvector off the "
        "energy: the point stays stationary, the rest of the spectrum what it is, and the gradient before is what the "
        f"others are compared with. The mode is the softest that carries at least {FELT:.0%} of the gradient: symmetry "
        "hides others from the loss.",
        "The adjoint solve names a saddle by the inertia of the assembled Hessian; MINRES does where one of its "
        "residuals is a direction of negative curvature.",
        "Propagation with the whole loss is one-sided propagation with curved=True; damping and weight are the same "
        "number. Beyond its reach (a negative eigenvalue near the damping) the nudged density leaves the region where "
        "the energy is quadratic, which the damped linear system does not know.",
        "The reference Hessian is the one that preconditioned the minimization, made near its start (anew, where one "
        "takes over 25 steps): its n products are not counted again. It exists in coordinates of the overlap, in which "
        "the minimization runs.",
        "Gradient descent takes the largest safe step, one over the largest eigenvalue's square; Adam's rate is the "
        "best of three by the final error, which favours it.",
    ]
    saddles = sum(found.point.saddles for group in groups for found in group.results)
    if saddles:
        notes.append(
            f"{saddles} minimizations ended at a saddle, with a projected gradient below the tolerance, and began "
            "again a little off it: L-BFGS from a symmetric start keeps the symmetry."
        )
    if missing:
        notes.append(f"Not measured: {', '.join(missing)}.")
    return notes


def _short(plain: Any) -> Any:
    """Plain data with its figures to five digits."""
    if isinstance(plain, dict):
        return {key: _short(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [_short(value) for value in plain]
    return float(f"{plain:.5g}") if isinstance(plain, float) else plain
