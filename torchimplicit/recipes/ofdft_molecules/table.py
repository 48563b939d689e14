"""The table ``ofdft-molecules``."""

from __future__ import annotations

from torchimplicit.recipes.ofdft_molecules.claims import better, claims
from torchimplicit.recipes.ofdft_molecules.config import MoleculesConfig
from torchimplicit.recipes.ofdft_molecules.drawings import drawings
from torchimplicit.recipes.ofdft_molecules.gathered import Group, read
from torchimplicit.recipes.ofdft_molecules.rows import ROWS, jobs, name_of, settings_of
from torchimplicit.recipes.ofdft_runs import missing, ratio, raw, shown, told
from torchimplicit.recipes.orbital_free.measure import Quality, summarized
from torchimplicit.recipes.reproduce.runner import Reproduction
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.runtime.table import Sheet, Summary
from torchimplicit.recipes.tables import Column, Table


def summarize(config: MoleculesConfig, runs: dict[str, Run]) -> Summary:
    """See :class:`~torchimplicit.recipes.runtime.table.Summary`."""
    groups = read(config, runs)
    sheets = []
    for qm9, title in ((False, f"{', '.join(config.molecules)}: new geometries"), (True, "QM9: new molecules")):
        shown_here = [group for group in groups if group.row.qm9 == qm9]
        if shown_here:
            sheets.append(Sheet(title, _table(shown_here)))
    if groups:
        first = groups[0]
        seed = next(iter(first.results))
        sheets.append(Sheet(f"{first.row.label}, seed {seed}: molecule by molecule", _molecules(first, seed)))
    return Summary(
        title="Density functionals for several molecules",
        source="Slides on fine-tuning density functionals under an electron-number constraint (Adamowicz): with many "
        "molecules the training loss fell without improving the densities; no figures. Those here are ours.",
        protocol=_protocol(config),
        sheets=sheets,
        claims=claims(groups),
        drawings=drawings(groups),
        notes=_notes(config, groups),
        runs={name_of(group.name, seed): raw(one) for group in groups for seed, one in group.results.items()},
    )


TABLE = Reproduction(jobs, summarize)


def _table(groups: list[Group]) -> Table:
    columns = [
        Column("Row"),
        Column(
            "Training L", "", "at the end over the start; the figures beside it are at the weights that are selected"
        ),
        Column("Test L", "10⁻³", "∫(ρ−ρ_gs)²/(2N), mean of the test molecules"),
        Column("Test L1", "", "∫|ρ−ρ_gs|/N, mean of the test molecules"),
        Column("Better", "%", "of the test molecules of all seeds, by L and by L1 both, than the superposition"),
        Column("Energy error", "mHa", "mean absolute, of the test molecules"),
        Column("Inner steps", "", "from the superposition of atoms to 1e-8, the worst test molecule"),
        Column("Iterations"),
        Column("Seconds", "s", "of the processor"),
        Column("Weights"),
        Column("Seeds"),
    ]
    lines = []
    for group in groups:
        every = list(group.results.values())
        lines.append(
            [
                group.row.label,
                told(group.each(ratio)),
                told([summarized(one.test).loss for one in every], 3, 1e3),
                told([summarized(one.test).l1 for one in every], 3),
                f"{100 * better(group.tested()):.0f}",
                told([summarized(one.test).energy_error for one in every], 3, 1e3),
                str(max(summarized(one.test).steps for one in every)),
                told([one.iterations for one in every], 2),
                told([one.seconds for one in every], 3),
                str(every[0].weights),
                str(len(every)),
            ]
        )
    for pairs in sorted({one.config.pairs for group in groups for one in group.results.values()}):
        lines.append(_before(groups, pairs))
    guess = [summarized(one.test) for one in groups[0].results.values()]
    row = ["superposition of atoms (MINAO)", "–", told([one.guess_loss for one in guess], 3, 1e3)]
    lines.append([*row, told([one.guess_l1 for one in guess], 3), *["–"] * (len(columns) - 4)])
    return Table(columns, lines)


def _before(groups: list[Group], pairs: bool) -> list[str]:
    """Before training, of the first row of this kind."""
    group = next(group for group in groups if next(iter(group.results.values())).config.pairs == pairs)
    found = [summarized(one.start_test) for one in group.results.values()]
    first: list[Quality] = [quality for one in group.results.values() for quality in one.start_test]
    return [
        f"before training, neighbours {'known' if pairs else 'not known'}",
        "1",
        told([one.loss for one in found], 3, 1e3),
        told([one.l1 for one in found], 3),
        f"{100 * better(first):.0f}",
        told([one.energy_error for one in found], 3, 1e3),
        str(max(one.steps for one in found)),
        *["–"] * 3,
        str(len(found)),
    ]


def _molecules(group: Group, seed: int) -> Table:
    columns = [
        Column("Molecule"),
        Column("Basis functions"),
        Column("L", "10⁻³"),
        Column("L, MINAO", "10⁻³"),
        Column("L1 per electron"),
        Column("L1, MINAO"),
        Column("Energy error", "mHa"),
        Column("Inner steps"),
    ]
    lines = []
    for split in ("train", "test"):
        found: list[Quality] = getattr(group.results[seed], split)
        for one in found:
            lines.append(
                [
                    f"{one.name} ({split})",
                    str(one.size),
                    shown(1e3 * one.loss, 3),
                    shown(1e3 * one.guess_loss, 3),
                    shown(one.l1, 3),
                    shown(one.guess_l1, 3),
                    shown(1e3 * one.energy_error, 3),
                    str(one.steps) if one.converged else f"{one.steps}, not converged",
                ]
            )
    return Table(columns, lines)


def _protocol(config: MoleculesConfig) -> str:
    of_qm9 = (
        f" QM9: {config.qm9_limit} molecules with the fewest atoms, {config.qm9_held_out} of them held out for "
        f"validation and as many for test, others for every seed; {config.qm9_seconds:g} s."
        if any(job.recipe == "ofdft-qm9" for job in jobs(config))
        else ""
    )
    plain = settings_of(config, ROWS["gauss-newton"], 0)
    return (
        f"{', '.join(config.molecules)}, each at its own geometry and in {config.train_copies} distorted "
        f"({config.distort:g} angstrom) to train on, {config.validation_copies} others to select the weights by (the "
        f"least L), {config.test_copies} others to test on; other geometries for each of {config.plan.seeds} seeds. "
        "Kohn-Sham densities (LDA, def2-SVP) in an even-tempered basis, grid level "
        f"{config.grid}. Thomas-Fermi, von Weizsäcker and LDA, a network as enhancement factor, and a linear term, "
        "which is fitted first. The loss is half the squared density error per electron, and a weight of "
        f"{plain.tail_weight:g} for the same over the density; energies, where they are "
        f"trained, weigh {config.energy_weight:g}. Every row has {config.seconds:g} s of the processor's time, "
        f"measurements not counted; Adam's rate {config.learning_rate:g} with a cosine.{of_qm9} Densities: "
        "preconditioned L-BFGS to 1e-8. Gradients: exact implicit differentiation; Gauss–Newton: exact Jacobians by "
        "the same theorem. Double precision, one thread."
    )


def _notes(config: MoleculesConfig, groups: list[Group]) -> list[str]:
    notes = [
        "L is dominated by the cores, where the density is high; L1 is not. A loss without its tails can fall many "
        "times while L1 does not move, so both are told.",
        "The energy of a functional that is trained by densities alone is free to drift: nothing holds it. With the "
        "energy term its derivative in the weights needs no adjoint (the envelope theorem). No claim of chemical "
        "accuracy (1.6 mHa) is made.",
    ]
    rejected = sum(one.rejected for group in groups for one in group.results.values())
    if rejected:
        notes.append(f"{rejected} evaluations met a density that was not found within the budget.")
    return notes + missing(len(jobs(config)), sum(len(group.results) for group in groups))
