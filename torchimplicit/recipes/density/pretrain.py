"""Trains a density functional, or a predictor of densities, on Kohn-Sham calculations without minimizing it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from torchimplicit.models.orbital_free import (
    CoefficientNetwork,
    Domain,
    Molecule,
    NetworkConfig,
    OrbitalFree,
    OrbitalFreeConfig,
)
from torchimplicit.recipes.density import labels, storage, training
from torchimplicit.recipes.density.case import Case
from torchimplicit.recipes.density.examples import Example, Missing, fit_start
from torchimplicit.recipes.density.learning_settings import Kind, Pretraining
from torchimplicit.recipes.density.predict import Trained
from torchimplicit.recipes.density.prepare import prepare_labels
from torchimplicit.recipes.density.pretraining_loss import PretrainingLoss
from torchimplicit.recipes.density.quality import Quality, errors, loaded, qualities, share_spurious
from torchimplicit.recipes.density.report import Page, Part, table_of, tell
from torchimplicit.recipes.density.settings import LabelSettings
from torchimplicit.recipes.density.split import located
from torchimplicit.recipes.density.stepping import Course, Stepper, trained_before
from torchimplicit.recipes.density.training import bounded, exchange_correlation
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import cache_folder
from torchimplicit.recipes.runtime.fitting import read_checkpoint
from torchimplicit.recipes.runtime.run import Environment, Run

# -- What comes out ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """``results.json``.

    Attributes:
        state: ``complete``.
        weights: weights of the network.
        start_test: the test molecules with the linear terms alone, empty for a predictor of densities.
        validation, test: the molecules that are held out, by minimization from the superposition of atoms; of a
            predictor of densities, by its densities.
        spurious: the share of the test molecules whose minimum is converged and yet another one; see :func:`spurious`.
        spurious_start: likewise with the linear terms alone.
        selected: the step whose weights they are.
        skipped: molecules that could not be computed.
        config: the settings.
    """

    state: str
    kind: Kind
    weights: int
    start_test: list[Quality]
    validation: list[Quality]
    test: list[Quality]
    spurious: float
    spurious_start: float
    selected: int
    skipped: list[str]
    course: Course
    environment: Environment
    config: Pretraining


# -- The runner; see :class:`torchimplicit.recipes.runtime.run.Runner` -------------------------------------------------


def check(config: Pretraining) -> None:
    """The molecules must be readable, and their exchange and correlation that of a functional.

    Raises:
        UserError: they are not.
    """
    training.check(config.training())


def train(config: Pretraining, run: Run, console: Console) -> bool:
    """Train from the last step that was kept, and write ``results.json`` and ``index.html``."""
    with bounded(config.training()):
        files, skipped = located(config.molecules, console)
        functional, examples, held = started(config, files, console)
        assert functional.network is not None
        stepper = stepper_of(config, functional.network, examples, held)
        stepper.restore(run)
        console.print(
            f"{len(examples)} molecules to train on, {len(held)} to select by and {len(files['test'])} to test; "
            f"{_count(functional.network)} weights; Ctrl-C stops and keeps what is done.",
            highlight=False,
        )
        if not stepper.run(run, console):
            return False
        results = _finished(config, functional, stepper.course, files, skipped, run)
    run.write_json("results.json", results)
    _tell(results, run, console)
    return True


def evaluate(config: Pretraining, run: Run, console: Console) -> None:
    """Measure the selected weights again."""
    course = trained_before(run)
    with bounded(config.training()):
        files, skipped = located(config.molecules, console)
        # what a finished run has left; an interrupted one has left the network's weights alone
        left = Trained.there(run)
        functional = Trained.of(run).functional if left else started(config, files, console)[0]
        results = _finished(config, functional, course, files, skipped, run)
    run.write_json("evaluation.json", {name: getattr(results, name) for name in ("validation", "test", "spurious")})
    _tell(results, run, console)


def started(
    config: Pretraining, files: Mapping[str, Mapping[str, Path]], console: Console
) -> tuple[OrbitalFree, list[Example], list[Example]]:
    """The functional with fitted linear terms and its initial network (single precision, scaled to the training
    molecules); and the training and validation examples."""
    records = {split: [storage.read(path) for path in files[split].values()] for split in ("train", "validation")}
    network = NetworkConfig.of(
        [record.molecule_without_grid() for record in records["train"]],
        width=config.width,
        channels=config.channels,
        rounds=config.rounds,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        functional = OrbitalFree(
            OrbitalFreeConfig(
                weizsaecker=config.weizsaecker,
                penalty=config.penalty,
                hidden=0,
                pairs=network.elements if config.pairs else (),
                exchange_correlation=exchange_correlation(config.training()),
                network=network,
                network_at="density" if config.kind == "functional" else "guess",
            )
        )
    labelled: dict[str, Any] = {}
    if config.kind == "functional":
        folder = config.molecules.data_dir or cache_folder("molecules")
        geometries = [record.geometry for record in records["train"]]
        outcomes = prepare_labels(geometries, config.molecules.chemistry, LabelSettings(count=config.labels), folder)
        labelled = {one.geometry.name: one.path for one in outcomes}
        if lacking := [f"{one.geometry.name}: {one.reason}" for one in outcomes if one.path is None]:
            raise UserError("labels could not be computed: " + "; ".join(lacking))
    bare: dict[str, list[Missing]] = {"train": [], "validation": []}
    without = OrbitalFree(replace(functional.config, network=None, pairs=()))
    with_pairs = OrbitalFree(replace(functional.config, network=None))
    with console.status("Reading the molecules") as status:
        for split, ones in records.items():
            for record in ones:
                status.update(f"Reading the molecules: {record.geometry.name}")
                path = labelled.get(record.geometry.name) if split == "train" else None
                bare[split].append(Missing.of(without, with_pairs, record, labels.read(path) if path else None))
    fit_start(functional, bare["train"])
    assert functional.network is not None
    examples = {split: [Example.of(functional, one) for one in ones] for split, ones in bare.items()}
    seen = [one.guess if config.kind != "functional" else one.rows for one in examples["train"]]
    functional.network.float().scale(seen, [one.graph.kinds for one in examples["train"]])
    return functional, examples["train"], examples["validation"]


def stepper_of(
    config: Pretraining, network: CoefficientNetwork, examples: Sequence[Example], held: Sequence[Example]
) -> Stepper:
    """The stepper that trains a network."""
    objective = PretrainingLoss(network, examples, held, config)
    return Stepper(
        network,
        config.stepping,
        len(examples),
        config.seed,
        objective.loss,
        objective.figures,
        (objective.kept, objective.take),
    )


def _finished(
    config: Pretraining,
    functional: OrbitalFree,
    course: Course,
    files: Mapping[str, Mapping[str, Path]],
    skipped: list[str],
    run: Run,
) -> Results:
    """The results, for the selected weights."""
    network = functional.network
    assert network is not None
    network.double().load_state_dict(read_checkpoint(run.best)["weights"])
    settings = config.training()
    start: list[Quality] = []
    if config.kind != "density":
        linear = OrbitalFree(replace(functional.config, network=None))
        linear.load_state_dict({k: v for k, v in functional.state_dict().items() if not k.startswith("network.")})
        start = qualities(loaded(files["test"]), linear, settings, files=files["test"])
        domain = Domain.of([storage.read(path).molecule_without_grid() for path in files["train"].values()])
        Trained(functional, domain, config.molecules.chemistry).save(run)
    if config.kind == "density":
        validation, test = (directly(functional, files[split]) for split in ("validation", "test"))
    else:
        validation, test = (
            qualities(loaded(files[split]), functional, settings, files=files[split])
            for split in ("validation", "test")
        )
    return Results(
        state="complete",
        kind=config.kind,
        weights=_count(network),
        start_test=start,
        validation=validation,
        test=test,
        spurious=share_spurious(test, files["test"]),
        spurious_start=share_spurious(start, files["test"]),
        selected=course.best,
        skipped=skipped,
        course=course,
        environment=Environment.of(torch.device("cpu")),
        config=config,
    )


@torch.no_grad()
def directly(functional: OrbitalFree, files: Mapping[str, Path]) -> list[Quality]:
    """Quality of each molecule's density as the network predicts it, without energy or minimization."""
    nothing: dict[str, Any] = {"energy_error": math.nan, "steps": 0, "evaluations": 0.0, "converged": True}
    return [Quality(**errors(case, predicted(functional, case)), **nothing) for case in loaded(files)]


def predicted(functional: OrbitalFree, case: Case) -> Tensor:
    """The density that a network predicts directly, ``[n]``: the superposition of atoms minus the network's slope
    there, in the metric's coordinates and with the right number of electrons."""
    assert functional.network is not None
    molecule: Molecule = case.molecule
    inverse, normal = case.plane
    slope = inverse @ functional.network.tangent(molecule)[1]
    return molecule.guess - inverse @ (slope - normal[0] * (normal[0] @ slope))


def _count(network: CoefficientNetwork) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# -- The page ---------------------------------------------------------------------------------------------------------


NAMES: dict[Kind, str] = {
    "potential": "A learned external potential",
    "functional": "A density functional of the coefficients",
    "density": "A predictor of the density",
}


def _tell(results: Results, run: Run, console: Console) -> None:
    """Print the results and, if there is to be one, write the page."""
    table = table_of(
        [
            Part("test, linear terms alone", results.start_test, spurious=results.spurious_start),
            Part("validation", results.validation),
            Part("test", results.test, spurious=results.spurious),
        ]
    )
    page = Page(
        title="Pre-training a density functional",
        lead=f"{NAMES[results.kind]} of {results.weights} weights, {results.course.step} steps, "
        f"{results.course.seconds:.0f} s; the weights of step {results.selected} were selected. "
        f"{100 * results.spurious:.0f} % of the test molecules have a spurious minimum.",
        panels={"L": "10³ L, linearized", "dE": "ΔE, mHa per electron"},
        caption="The validation molecules during training: how far their minima would be away, and their energies.",
        logarithmic=True,
    )
    tell(table, page if results.config.page else None, results.course, run, console)
