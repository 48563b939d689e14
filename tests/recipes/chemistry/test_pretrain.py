"""Pre-training and fine-tuning of density functionals, on hydrogen."""

from __future__ import annotations

import io
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("pyscf")
pytest.importorskip("lightning")
pytest.importorskip("tyro")

from rich.console import Console
from running import trained

from torchimplicit import cli
from torchimplicit.models.orbital_free import OrbitalFree
from torchimplicit.recipes.density import pretrain, storage
from torchimplicit.recipes.density.case import Case
from torchimplicit.recipes.density.examples import slopes_of
from torchimplicit.recipes.density.learning_settings import Finetuning, Pretraining, Stepping
from torchimplicit.recipes.density.predict import Trained
from torchimplicit.recipes.density.pretraining_loss import PretrainingLoss
from torchimplicit.recipes.density.settings import ChemistrySettings, Molecules
from torchimplicit.recipes.density.split import located
from torchimplicit.recipes.registry import settings as settings_of
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.run import Run, RunOptions, create

CONSOLE = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("molecules")


def hydrogen(folder: Path) -> Molecules:
    return Molecules(
        sources=("H2",),
        distort=0.08,
        train_copies=2,
        validation_copies=1,
        test_copies=1,
        data_dir=folder,
        chemistry=ChemistrySettings(grid=0, scf_grid=1),
    )


def settings(folder: Path, kind: str, **more: object) -> Pretraining:
    """With linear terms that leave something to learn, which those of pairs do not in hydrogen."""
    made = Pretraining(
        molecules=hydrogen(folder),
        kind=kind,
        labels=3,
        stepping=Stepping(steps=30, batch=2, measure_every=10),
        width=8,
        channels=2,
        pairs=False,
        check_grid=0,
        page=False,
    )
    return replace(made, **more)


@pytest.mark.parametrize("kind", ["potential", "functional", "density"])
def test_it_learns(folder, tmp_path, kind) -> None:
    config = replace(settings(folder, kind), page=kind == "potential")
    run = trained("pretrain", config, tmp_path / "run")
    results = json.loads((run.path / "results.json").read_text())
    losses = [glance["figures"]["L"] for glance in results["course"]["glances"]]
    assert len(losses) == 4
    assert min(losses[1:]) < losses[0]
    (test,) = results["test"]
    assert test["converged"]
    assert test["loss"] < test["guess_loss"]
    assert results["spurious"] == 0
    if kind == "density":  # what is trained is what is measured
        assert min(losses) == pytest.approx(1e3 * results["validation"][0]["loss"], rel=1e-3)
    if kind != "density":
        assert Trained.of(run).functional.network is not None
        assert test["loss"] == pytest.approx(_loss(run, folder), rel=1e-3)


def _loss(run: Run, folder: Path) -> float:
    """Of the test molecule, by what the run has left."""
    files, _ = located(hydrogen(folder))
    (path,) = files["test"].values()
    case = Case.of(storage.load(path))
    with torch.no_grad():
        found = case.solved(Trained.of(run).functional, settings(folder, "potential").training(), cold=True)
    return float(case.loss(found.value))


def test_loss_and_energy_are_those_of_the_minimum(folder) -> None:
    """The linearized L of the network's slope is the L of the minimum, and the energy to second order its energy."""
    config = settings(folder, "potential")
    files, _ = located(config.molecules)
    functional, examples, _ = pretrain.started(config, files, CONSOLE)
    with torch.no_grad():
        for parameter in functional.network.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    example = examples[0]
    ((_, slope),) = slopes_of(functional.network, [example], [example.guess], recorded=False)
    missed = slope @ example.answer.T - example.wanted[:1]
    linearized = 0.5 * float(missed.square().sum()) / example.electrons
    error = PretrainingLoss(functional.network, examples, [example], config).figures()["dE"]
    functional.network.double()
    case = Case.of(storage.load(files["train"][example.name]))
    with torch.no_grad():
        found = case.solved(functional, config.training(), cold=True)
    assert bool(found.converged)
    assert linearized == pytest.approx(float(case.loss(found.value)), rel=0.1)
    with torch.no_grad():
        at_minimum, at_reference = (
            1e3 * float(functional(p, case.molecule) - case.molecule.energy) / example.electrons
            for p in (found.value, case.molecule.reference)
        )
    assert abs(error - abs(at_minimum)) < 0.1 * abs(at_reference - at_minimum)


def test_the_slope_that_is_wanted_is_the_energy_s(folder) -> None:
    """Along a displacement that keeps the electrons, whatever multiple of their integrals the slope has."""
    config = settings(folder, "potential")
    files, _ = located(config.molecules)
    functional, examples, _ = pretrain.started(config, files, CONSOLE)
    example = examples[0]
    molecule = storage.load(files["train"][example.name])
    known = OrbitalFree(replace(functional.config, network=None))
    known.load_state_dict({k: v for k, v in functional.state_dict().items() if not k.startswith("network.")})
    case = Case.of(molecule)
    inverse, normal = case.plane
    y = torch.randn(molecule.size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    y = y - normal[0] * (normal[0] @ y)
    values = [float(known(molecule.reference + step * (inverse @ y), molecule)) for step in (1e-4, -1e-4)]
    slope = (values[0] - values[1]) / 2e-4  # of what is known; the exact energy has none at the reference
    assert float(example.gradient([0])[0].double() @ y) == pytest.approx(-slope, rel=1e-3, abs=1e-5)


def test_a_resumed_run_is_the_undisturbed_one(folder, tmp_path) -> None:
    config = settings(folder, "functional")
    whole, cut = (
        trained("pretrain", config, tmp_path / "whole"),
        create("pretrain", RunOptions(output=tmp_path / "cut")),
    )
    cut.describe("pretrain", config)
    files, _ = located(config.molecules)
    functional, examples, held = pretrain.started(config, files, CONSOLE)
    stepper = pretrain.stepper_of(config, functional.network, examples, held)
    loss = stepper.loss

    def stopped(numbers: list[int], step: int) -> float:
        value = loss(numbers, step)  # which has moved the walks
        if step == 17:
            raise KeyboardInterrupt
        return value

    stepper.loss = stopped
    assert not stepper.run(cut, CONSOLE)
    pretrain.train(config, cut, CONSOLE)
    one, two = (Trained.of(run).functional.network.state_dict() for run in (whole, cut))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def potential(folder, tmp_path_factory) -> Run:
    config = settings(folder, "potential", stepping=Stepping(steps=5, batch=2, measure_every=5))
    return trained("pretrain", config, tmp_path_factory.mktemp("runs") / "potential")


@pytest.mark.parametrize("gradient", ["implicit", "eqprop", "damped"])
def test_fine_tuning_lowers_the_loss(potential, tmp_path, gradient) -> None:
    config = Finetuning(
        run=potential.path,
        gradient=gradient,
        stepping=Stepping(steps=8, batch=3, learning_rate=3e-3, measure_every=4, decay=0.0),
        check_grid=0,
        page=gradient == "implicit",
    )
    run = trained("finetune", config, tmp_path / "run")
    results = json.loads((run.path / "results.json").read_text())
    before = sum(one["loss"] for one in results["before_train"])
    after = sum(one["loss"] for one in results["train"])
    assert after < before
    assert all(one["converged"] for one in results["test"])
    assert results["effort"][0]["steps"] > 0
    # with one element, constants that are refitted leave no error in the mean
    assert sum(one["energy_error"] for one in results["train"]) == pytest.approx(0, abs=1e-8)
    assert abs(sum(one["trained_energy_error"] for one in results["train"])) > 1e-6
    assert len(results["reference"]) == len(results["test"]) == 1


def test_from_the_command_line(folder, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ask = ("--sources", "H2", "--train-copies", "1", "--validation-copies", "1", "--test-copies", "1", "--grid", "0")
    ask += ("--scf-grid", "1", "--check-grid", "0", "--data-dir", str(folder), "--width", "8", "--no-page")
    assert cli.main(["pretrain", *ask, "--steps", "4", "--measure-every", "2", "--output", "first"]) == 0
    assert cli.main(["evaluate", "first"]) == 0
    before, after = (
        json.loads((tmp_path / "first" / f"{name}.json").read_text()) for name in ("results", "evaluation")
    )
    assert after["test"][0]["energy_error"] == pytest.approx(before["test"][0]["energy_error"], abs=1e-9)
    more = ("--steps", "2", "--measure-every", "1", "--check-grid", "0", "--output", "second")
    assert cli.main(["finetune", "first", *more]) == 0
    assert cli.main(["evaluate", "second"]) == 0
    assert cli.main(["pretrain", *ask, "--held-out", "3"]) == 2
    assert not (tmp_path / "runs").exists()  # nothing is begun
    capsys.readouterr()
    assert cli.main(["finetune", "--steps", "2"]) == 2
    assert "finetune needs the directory of a run of 'torchimplicit pretrain'" in capsys.readouterr().err
    assert cli.main(["finetune", "second", "--steps", "2"]) == 2
    assert "not a run of 'torchimplicit pretrain'" in capsys.readouterr().err
    assert cli.main(["finetune", "first", "--only", "He"]) == 2
    assert cli.main(["pretrain", *ask, "--kind", "density", "--steps", "2", "--output", "third"]) == 0
    assert cli.main(["finetune", "third"]) == 2
    assert "no minimum" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "first"), [("pretrain", "kind"), ("finetune", "run")])
def test_help_begins_with_a_command_s_own_options(command, first) -> None:
    names = [one.name for one in fields(settings_of(command))]
    assert names.index(first) < names.index("check_grid")


@pytest.mark.parametrize("wrong", [{"labels": 0}, {"noise": -1.0}, {"width": 0}])
def test_settings_that_make_no_sense(folder, wrong) -> None:
    with pytest.raises(UserError):
        settings(folder, "potential", **wrong)


def test_molecules_are_shown_as_they_are_computed(tmp_path) -> None:
    config = replace(hydrogen(tmp_path), train_copies=1, validation_copies=0, test_copies=0)
    shown = []
    for _ in range(2):
        console = Console(file=io.StringIO(), width=200)
        located(config, console)
        shown.append(console.file.getvalue().splitlines())
    assert [line.split(", ")[-1] for line in shown[0]] == ["1 of 2 molecules", "2 of 2 molecules"]
    assert shown[1] == [], "nothing is computed twice"
