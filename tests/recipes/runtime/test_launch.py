"""One run in several processes, started by torchrun, by Slurm's srun, and by the job script."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("lightning")
pytest.importorskip("tyro")

import srun
import tiny

from torchimplicit.recipes import commands, registry
from torchimplicit.recipes.runtime import launch
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.log import rows
from torchimplicit.recipes.runtime.run import Run
from torchimplicit.recipes.runtime.trainer import Results

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
SCRIPT = Path(__file__).parents[3] / "scripts" / "train.sbatch"
SRUN = (sys.executable, srun.__file__, sys.executable)


def command(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def losses(path: Path) -> list[tuple[float, float]]:
    return [(row["step"], row["loss"]) for row in rows(Run(path).metrics) if "loss" in row]


@pytest.fixture(scope="module")
def spawned(tmp_path_factory) -> Path:
    """A run in two processes that a command on one machine has spawned."""
    path = tmp_path_factory.mktemp("spawned") / "run"
    done = command(sys.executable, tiny.__file__, "train", "tiny", "--devices", 2, "--output", path)
    assert done.returncode == 0, done.stderr
    return path


def test_torchrun_trains_as_spawned_processes_do(spawned, tmp_path):
    done = command(*TORCHRUN, tiny.__file__, "train", "tiny", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == losses(spawned)
    assert done.stdout.count("Done: ") == 1, "one process speaks"
    test, other = (Results.of(Run(path)).test for path in (tmp_path / "run", spawned))
    assert test is not None
    assert other is not None
    assert test.figures == other.figures


def test_a_job_stops_in_all_processes_and_is_resumed(spawned, tmp_path):
    """By scripts/train.sbatch; one process is told to stop, and the same job is then started anew."""
    path = tmp_path / "run"
    _executable(tmp_path / "srun", f'exec "{sys.executable}" "{srun.__file__}" "$@"')
    _executable(tmp_path / "torchimplicit", f'exec "{sys.executable}" "{tiny.__file__}" "$@"')
    job = ("bash", SCRIPT, path, "tiny", "--terminate", 6)
    search = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    stopped = command(*job, PATH=search)
    assert stopped.returncode == 130, stopped.stderr
    assert Run(path).read()["state"] == "interrupted"
    assert Results.of(Run(path)).steps == 4
    resumed = command(*job, PATH=search, TINY_SPARE="1")
    assert resumed.returncode == 0, resumed.stderr
    assert losses(path) == losses(spawned)


def test_a_job_passes_sigterm_on_and_asks_to_be_started_anew(tmp_path):
    _executable(tmp_path / "srun", 'trap "exit 130" TERM; echo "$@" >asked; while true; do sleep 0.05; done')
    _executable(tmp_path / "scontrol", 'echo "$@" >requeued')
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    job = subprocess.Popen(["bash", SCRIPT, "run", "tiny", "--steps", "9"], cwd=tmp_path, env=environment)
    while not (tmp_path / "asked").exists() or not (tmp_path / "asked").read_text():
        time.sleep(0.05)
    job.terminate()
    assert job.wait(timeout=60) == 130
    assert (tmp_path / "asked").read_text().split(maxsplit=1)[1] == "torchimplicit train tiny --steps 9 --output run\n"
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def _executable(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/bash\n{line}\n")
    path.chmod(0o755)


def test_a_loss_that_is_not_finite_in_one_process_ends_all(tmp_path):
    done = command(*SRUN, tiny.__file__, "train", "tiny", "--output", tmp_path / "run", "--poison", 6)
    assert done.returncode == 1
    assert done.stderr.count("training diverged: the loss is not finite in another process at step 6") == 1
    assert Run(tmp_path / "run").read()["state"] == "diverged"


def test_a_refusal_is_told_once_and_ends_all(tmp_path):
    done = command(*SRUN, tiny.__file__, "train", "tiny", "--batch-size", 1, "--output", tmp_path / "run")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("every device must get a sample") == done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["tiny"], "--output is required"),
        (["tiny", "--output", "run", "--devices", "2"], "has started the processes already"),
        (["digits", "--output", "run"], "this recipe runs in one process"),
        (["graphs-chains", "--output", "run"], "--devices: all chains are one graph"),
    ],
)
def test_what_several_processes_cannot_do(tmp_path, monkeypatch, words, complaint):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "RECIPES", dict(registry.RECIPES))
    tiny.register()
    for module in (launch, commands):
        monkeypatch.setattr(module, "environment", lambda: SimpleNamespace(world_size=lambda: 2))
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=complaint):
        commands.main(["train", *words])
    assert not list(tmp_path.iterdir())


def test_srun_must_say_how_many_processes_each_node_has(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    with pytest.raises(UserError, match="--ntasks-per-node"):
        launch.environment.__wrapped__()
