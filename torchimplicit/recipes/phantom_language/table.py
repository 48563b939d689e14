"""The table: its runs, and what they come to."""

from __future__ import annotations

import json
from statistics import fmean

from torchimplicit.recipes.phantom_language.config import ROWS, PhantomLanguage, Row, language
from torchimplicit.recipes.phantom_language.costs import CONVERGED, Cost, CostConfig, Measured
from torchimplicit.recipes.phantom_language.pictures import against_seconds, against_steps
from torchimplicit.recipes.phantom_language.trained import Trained
from torchimplicit.recipes.plain import from_plain, to_plain
from torchimplicit.recipes.reproduce.runner import Reproduction
from torchimplicit.recipes.run import Run
from torchimplicit.recipes.runtime.table import Claim, Job, Sheet, Summary, spread
from torchimplicit.recipes.tables import Column, Table
from torchimplicit.recipes.training.results import Results

COSTS = "costs"
"""The job that measures steps in turn."""


def jobs(config: PhantomLanguage) -> list[Job]:
    """The published rows with one seed, then with the next, then the others; at last the costs, at the weights of the
    first seed."""
    recipe = f"language-wikitext{'103' if config.plan.scale == 'paper' else '2'}"
    made = [
        Job(f"{name}-{seed}", recipe, language(config, row, seed))
        for published in (True, False)
        for seed in config.plan.all_seeds
        for name, row in ROWS.items()
        if (row.perplexity is not None) == published
    ]
    first = [job for job in made if job.config.optimization.seed == config.plan.first_seed]
    measured = CostConfig(
        names=tuple(job.name for job in first), runs=tuple(job.config for job in first), repeats=config.repeats
    )
    return [*made, Job(COSTS, "language-costs", measured)]


def summarize(config: PhantomLanguage, runs: dict[str, Run]) -> Summary:
    """The record."""
    measured = _measured(runs)
    trained = {name: _trained(config, name, row, runs, measured) for name, row in ROWS.items()}
    trained = {name: one for name, one in trained.items() if one.results}
    budgets = [one.seconds for one in trained.values() if one.seconds is not None]
    budget = min(budgets) if budgets else None
    sheets = [Sheet("Perplexity and cost", _main(trained, budget))]
    if measured.costs:
        sheets.append(Sheet("A training step at the same weights, in turn", _steps(measured, config)))
    return Summary(
        title="Language modelling with implicit and phantom gradients",
        source="Geng et al. 2021, On Training Implicit Models (arXiv 2111.05177), Table 3: DEQ on WikiText-103.",
        protocol=_protocol(config, trained),
        sheets=sheets,
        claims=_claims(trained, measured, config),
        drawings=[against_steps(trained), *([against_seconds(trained)] if budget is not None else [])],
        notes=_notes(config, trained, measured),
        runs={name: _raw(run) for name, run in runs.items()},
    )


TABLE = Reproduction(jobs, summarize)


def _measured(runs: dict[str, Run]) -> Measured:
    if COSTS not in runs or not (runs[COSTS].path / "results.json").is_file():
        return Measured()
    return from_plain(Measured, runs[COSTS].read_json("results.json"))


def _trained(config: PhantomLanguage, name: str, row: Row, runs: dict[str, Run], measured: Measured) -> Trained:
    results = []
    for seed in config.plan.all_seeds:
        run = runs.get(f"{name}-{seed}")
        if run is not None and (run.path / "results.json").is_file():
            results.append(Results.of(run))
    first = f"{name}-{config.plan.first_seed}"
    costs = measured.costs.get(first)
    seconds = None
    if costs is not None:
        seconds = costs["implicit" if row.gradient == "implicit" else "phantom"].seconds
        if row.jacobian:
            seconds += language(config, row, 0).equilibria.jacobian_probability * costs["penalty"].seconds
    return Trained(row, results, seconds, measured.radius.get(first))


def _main(trained: dict[str, Trained], budget: float | None) -> Table:
    base = trained.get("post-implicit")
    columns = [
        Column("Training"),
        Column("Published perplexity", note="on the test text of WikiText-103, with 98M parameters"),
        Column("Published speed", note="of training, against PostLN implicit"),
        Column("Perplexity at equal steps", note="on the test text, at the weights of the best validation"),
        Column(
            "Perplexity at equal time",
            note="on the validation text, when a row has trained as long as the quickest one does in all",
        ),
        Column("Forward evaluations", note="of the cell a step, UPG's own steps included"),
        Column("Backward evaluations", note="products with the Jacobian a step"),
        Column(
            "Spectral radius", note="of the Jacobian at equilibria of the validation text, the first seed's weights"
        ),
        Column("Step", "s", "forward and backward pass, measured in turn, with the penalty's share"),
        Column("Speed", note="against PostLN implicit"),
    ]
    rows = []
    for one in trained.values():
        ratio = "–"
        if one.step_seconds and base is not None and base.step_seconds:
            ratio = f"{base.step_seconds / one.step_seconds:.2f}×"
        diverged = sum(r.state == "diverged" for r in one.results)
        rows.append(
            [
                one.row.label + (f" ({diverged} of {len(one.results)} diverged)" if diverged else ""),
                "–" if one.row.perplexity is None else f"{one.row.perplexity:.1f}",
                "–" if one.row.speed is None else f"{one.row.speed:.1f}×",
                spread(one.tested),
                "–" if budget is None else spread(one.validated_after(budget)),
                spread(one.cost("forward")),
                spread(one.cost("backward")),
                "–" if one.radius is None else f"{one.radius:.2f}",
                "–" if one.step_seconds is None else f"{one.step_seconds:.3f}",
                ratio,
            ]
        )
    return Table(columns, rows)


_KINDS = {
    "implicit": "implicit",
    "converged": f"implicit, backward to {CONVERGED:g}",
    "phantom": "UPG(5, 0.8)",
    "penalty": "the penalty alone",
}


def _steps(measured: Measured, config: PhantomLanguage) -> Table:
    columns = [
        Column("Weights of", note="the first seed's"),
        Column("Step"),
        Column("Forward", "s"),
        Column("Backward", "s"),
        Column("Forward evaluations"),
        Column("Backward evaluations"),
        Column("Speed", note="both passes, against implicit at these weights"),
    ]
    rows = []
    for name, kinds in measured.costs.items():
        row = ROWS[name.removesuffix(f"-{config.plan.first_seed}")]
        for kind, label in _KINDS.items():
            cost = kinds[kind]
            rows.append(
                [
                    row.label,
                    label,
                    f"{cost.forward_seconds:.3f}",
                    f"{cost.backward_seconds:.3f}",
                    f"{cost.forward:.1f}",
                    f"{cost.backward:.1f}",
                    "–" if kind == "penalty" else f"{kinds['implicit'].seconds / cost.seconds:.2f}×",
                ]
            )
    return Table(columns, rows)


PAIRS = {"PostLN": ("post-implicit", "post-phantom"), "PreLN + JR": ("pre-jacobian-implicit", "pre-jacobian-phantom")}
"""The published pairs: implicit, UPG."""


def _claims(trained: dict[str, Trained], measured: Measured, config: PhantomLanguage) -> list[Claim]:
    claims = []
    for label, (exact, phantom) in PAIRS.items():
        if exact not in trained or phantom not in trained:
            continue
        one, other = trained[exact], trained[phantom]
        if one.tested and other.tested:
            claims.append(
                Claim(
                    f"{label}: UPG(5, 0.8) loses at most 2 % of perplexity to the implicit gradient at equal steps",
                    f"{spread(other.tested)} against {spread(one.tested)} (published {other.row.perplexity} against "
                    f"{one.row.perplexity})",
                    fmean(other.tested) <= 1.02 * fmean(one.tested),
                )
            )
        if one.step_seconds and other.step_seconds and one.row.speed and other.row.speed:
            aim = other.row.speed / one.row.speed
            claims.append(
                Claim(
                    f"{label}: a step with UPG(5, 0.8) is at least {aim:.1f} times as fast as the implicit one",
                    f"{one.step_seconds / other.step_seconds:.2f} times",
                    one.step_seconds / other.step_seconds >= round(aim, 1),
                )
            )
    pair = [trained.get(name) for name in ("pre-implicit", "pre-jacobian-implicit")]
    if all(one is not None and one.cost("forward") for one in pair):
        without, penalized = (fmean(one.cost("forward")) for one in pair if one is not None)
        claims.append(
            Claim(
                "Jacobian regularization saves forward evaluations",
                f"{penalized:.1f} with it, {without:.1f} without, PreLN and implicit",
                penalized < without,
            )
        )
    radii = [one.radius for one in pair if one is not None and one.radius is not None]
    if len(radii) == 2:
        claims.append(
            Claim(
                "Jacobian regularization lowers the spectral radius at the equilibrium",
                f"{radii[1]:.2f} with it, {radii[0]:.2f} without, PreLN and implicit, the first seed",
                radii[1] < radii[0],
            )
        )
    return claims


def _protocol(config: PhantomLanguage, trained: dict[str, Trained]) -> str:
    one = language(config, ROWS["post-implicit"], config.plan.first_seed)
    chosen, at = one.optimization, one.equilibria
    sizes = {r.parameters for t in trained.values() for r in t.results}
    words = "all words" if one.vocabulary is None else f"the {one.vocabulary} most frequent words, the others <unk>"
    millions = "/".join(f"{size / 1e6:.2f}M" for size in sorted(sizes))
    part = ""
    if one.validation_tokens and one.test_tokens:
        part = (
            f" Validation on the first {one.validation_tokens} tokens of its text, the test on the first "
            f"{one.test_tokens}."
        )
    return (
        f"{one.corpus}, {words}; a DEQ transformer of {millions} parameters; {chosen.steps} steps of "
        f"{chosen.batch_size} × {one.segment_length} tokens with {chosen.optimizer.capitalize()} at "
        f"{chosen.learning_rate:g}; forward solves to {at.tolerance:g} within {at.solver_steps} steps, implicit "
        f"backward solves to {at.backward_tolerance:g} within {at.backward_steps}. JR: Jacobian regularization with "
        f"weight 2.0 and probability 0.4. The tested weights are those of the best validation.{part} Seeds: "
        f"{', '.join(map(str, config.plan.all_seeds))}; mean ± standard deviation over them."
    )


def _notes(config: PhantomLanguage, trained: dict[str, Trained], measured: Measured) -> list[str]:
    notes = []
    if config.plan.scale == "cpu":
        notes.append(
            "Another text, vocabulary and size than the published table's, and a small part of one pass over the "
            "text: compare rows with rows, not perplexities with the published ones."
        )
    if config.plan.seeds < 3:
        notes.append(f"With {config.plan.seeds} seeds a standard deviation says little.")
    notes.append(
        "Equal time is counted in steps times the seconds of a step as measured in turn at trained weights, not in the "
        "seconds of the logs, which depend on what else the machine did; and on the validation text, which is all that "
        "is measured in the middle of a training."
    )
    backward = [
        (kinds["implicit"].backward, kinds["converged"].backward, kinds["phantom"].backward)
        for kinds in measured.costs.values()
    ]
    if backward:
        exact, converged, phantom = (fmean(column) for column in zip(*backward, strict=True))
        notes.append(
            f"A backward pass with the implicit gradient needs {exact:.1f} products with the Jacobian here "
            f"({converged:.1f} to {CONVERGED:g}), UPG {phantom:.1f}, and 5 more forward evaluations: the phantom "
            "gradient saves where the backward solver needs many, up to 35 in the published runs."
        )
    for one in trained.values():
        unconverged = one.cost("unconverged")
        if unconverged and fmean(unconverged) > 0.01:
            notes.append(
                f"{one.row.label}: {100 * fmean(unconverged):.0f} % of the samples stopped at the solver's budget."
            )
    missing = [row.label for name, row in ROWS.items() if name not in trained]
    if missing:
        notes.append(f"Not run: {', '.join(missing)}.")
    short = [
        f"{one.row.label} ({len(one.results)})" for one in trained.values() if len(one.results) < config.plan.seeds
    ]
    if short:
        notes.append(f"Rows with fewer seeds than {config.plan.seeds}: {', '.join(short)}.")
    return notes


def _raw(run: Run) -> dict[str, object]:
    """A run's figures, without its settings."""
    try:
        found = run.read_json("results.json")
    except (OSError, json.JSONDecodeError):
        return {"state": run.read()["state"]}
    found.pop("settings", None)
    return dict(to_plain(found))


__all__ = ["TABLE", "Cost", "Trained", "jobs", "summarize"]
