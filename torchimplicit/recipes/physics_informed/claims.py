"""What was aimed at, and what came out; and what else a reader must know."""

from __future__ import annotations

from torchimplicit.recipes.physics.config import EquationName
from torchimplicit.recipes.physics.equations import EQUATIONS
from torchimplicit.recipes.physics_informed.config import PhysicsInformedConfig
from torchimplicit.recipes.physics_informed.jobs import MODELS, OPTIMIZERS, equations, jobs, optimizers
from torchimplicit.recipes.physics_informed.read import Cell, Found
from torchimplicit.recipes.runtime.table import Claim

AIMS = {5: 1e-2, 20: 1e-3}
"""IAE on the Van der Pol oscillator, by states."""


def claims(config: PhysicsInformedConfig, found: Found) -> list[Claim]:
    """The aims; then whether the equilibrium is more accurate than the network of its size."""
    made = []
    for states, aim in AIMS.items():
        for optimizer in optimizers(config):
            if cell := found.cells.get(("van-der-pol", f"equilibrium-{states}", optimizer)):
                errors = cell.errors()
                made.append(
                    Claim(
                        f"Van der Pol, {states} states, {OPTIMIZERS[optimizer]}: IAE at most {aim:g} with every seed, "
                        f"in {_seconds(cell):g} s",
                        f"largest of {len(errors)} seeds {max(errors):.1e}, median {cell.error():.1e}",
                        max(errors) <= aim,
                    )
                )
    for equation in equations(config):
        for states in AIMS:
            pair = _best(found, equation, f"equilibrium-{states}"), _best(found, equation, f"network-{states}")
            if pair[0] is not None and pair[1] is not None:
                made.append(
                    Claim(
                        f"{EQUATIONS[equation].title}: the equilibrium with {states} states is at least as accurate as "
                        "the network of its size in the same time, each with the optimizer of its least training loss",
                        f"median error {_told(pair[0])} against {_told(pair[1])}",
                        pair[0].error() <= pair[1].error(),
                    )
                )
    return made


def notes(config: PhysicsInformedConfig, found: Found) -> list[str]:
    """What else a reader must know."""
    made = []
    for equation in equations(config):
        ranked = sorted(found.of(equation), key=Cell.loss)
        if ranked:
            best = {
                kind: next(
                    (cell for cell in ranked if (MODELS[cell.model].states is None) == (kind == "network")), None
                )
                for kind in ("equilibrium", "network")
            }
            told = [
                f"of the {kind} models, {MODELS[cell.model].label} with {OPTIMIZERS[cell.optimizer]} has an error of "
                f"{cell.error():.1e}"
                for kind, cell in best.items()
                if cell is not None
            ]
            made.append(f"{EQUATIONS[equation].title}, by the least training loss: {'; '.join(told)} in the median.")
    paces = []
    for equation in equations(config):
        one = found.cells.get((equation, "equilibrium-20", "least-squares"))
        other = found.cells.get((equation, "network-20", "least-squares"))
        if one is not None and other is not None:
            paces.append(f"{EQUATIONS[equation].title} {one.pace():.0f} against {other.pace():.0f} ms")
    if paces:
        made.append(
            "A Gauss–Newton iteration of the equilibrium with 20 states takes, against that of the network of its "
            f"size: {', '.join(paces)}. It solves for the equilibrium anew, and a system for each derivative and "
            "each gradient; a network has nothing to solve."
        )
    rejected = sum(one.rejected for cell in found.cells.values() for one in cell.results.values())
    unconverged = max((one.unconverged for cell in found.cells.values() for one in cell.results.values()), default=0.0)
    made += [
        "The coupling B is written so that its Frobenius norm stays below one, where the thesis penalizes the "
        "Jacobian: the map contracts at all weights that an optimizer may try. Over all runs "
        f"{rejected} evaluations met an equilibrium that was not found, and the largest share of such points at the "
        f"end of a run is {unconverged:g}.",
        "Time is the processor's, of one core, and errors are measured outside of it. Every run is counted, with its "
        "last weights; the error against the trusted solution selects nothing.",
        "The loss is that of the thesis without its Jacobian penalty: the mean square of the initial or boundary "
        "residual (ten times that on Helmholtz' equation) and a tenth of that of the equation. Points are fewer than "
        "in the thesis and do not change, so that the residuals are one vector, which Gauss–Newton needs; Adam's "
        "learning rate is higher and falls along a cosine.",
    ]
    if found.left:
        shown = ", ".join(found.left[:6]) + (", ..." if len(found.left) > 6 else "")
        made.append(f"{len(found.left)} of {len(jobs(config))} runs are not done or diverged, and left out: {shown}.")
    return made


def _best(found: Found, equation: EquationName, model: str) -> Cell | None:
    """Of an equation and a model, with the optimizer of the least median loss: the error may not select."""
    return min((cell for cell in found.of(equation) if cell.model == model), key=Cell.loss, default=None)


def _seconds(cell: Cell) -> float:
    """The budget of its runs."""
    return next(iter(cell.results.values())).config.seconds or float("nan")


def _told(cell: Cell) -> str:
    return f"{cell.error():.1e} ({OPTIMIZERS[cell.optimizer]})"
