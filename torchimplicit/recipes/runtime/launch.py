"""Several processes that torchrun or Slurm's srun started for one command.

The process of rank 0 runs the command. The others wait until it trains, take part in that, and end with its exit code.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.run import Distributed, Runner

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from torch.distributed import Store  # type: ignore[attr-defined]

LEAVE = 20.0
"""Seconds for which processes wait for each other when the command ends, or when one of them fails."""


@cache
def environment() -> ClusterEnvironment | None:
    """Lightning's description of the launcher; ``None`` if this process is the only one.

    Raises:
        UserError: Slurm's settings do not say how many processes each node has.
    """
    torchrun, srun = "TORCHELASTIC_RUN_ID" in os.environ, "SLURM_STEP_NUM_TASKS" in os.environ
    if not (torchrun or srun):
        return None
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    if not torchrun and int(os.environ["SLURM_STEP_NUM_TASKS"]) > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise UserError("srun must be told how many processes each node has: give sbatch or srun --ntasks-per-node")
    here = TorchElasticEnvironment() if torchrun else SLURMEnvironment(auto_requeue=False)
    return here if here.world_size() > 1 else None


def nodes() -> int:
    """Number of machines that take part."""
    if environment() is None:
        return 1
    return int(os.environ.get("GROUP_WORLD_SIZE") or os.environ["SLURM_NNODES"])


def spread(runner: Runner, settings: Any) -> Any:
    """The settings with as many devices as there are processes. Alone, they are returned as they are.

    Raises:
        UserError: the recipe does not run in several processes.
    """
    here = environment()
    if here is None:
        return settings
    if not isinstance(runner, Distributed):
        raise UserError("this recipe runs in one process; start it without torchrun or srun")
    if here.world_size() % nodes():
        raise UserError(f"{here.world_size()} processes on {nodes()} nodes: each node must have as many")
    return replace(settings, machine=replace(settings.machine, devices=here.world_size()))


def together(lead: Callable[[], int], follow: Callable[[Path], None]) -> int:
    """Run a command and return its exit code, which is the same in all processes.

    Args:
        lead: the command; run by the process of rank 0, or by the only one.
        follow: takes part in training the run in a directory; run by the others if rank 0 calls :func:`announce`.
    """
    here = environment()
    if here is None:
        return lead()
    return _lead(lead) if here.global_rank() == 0 else _follow(follow)


def announce(run: Path) -> None:
    """Let the other processes, if there are any, take part in training the run."""
    if environment() is not None:
        _store().set("run", str(run.resolve()))
        _connect()


def _lead(lead: Callable[[], int]) -> int:
    here, store, code = environment(), _store(), 1
    assert here is not None
    try:
        code = lead()
    finally:
        store.set("code", json.dumps(code))
        ended = time.monotonic() + LEAVE
        with suppress(KeyboardInterrupt):
            while store.add("left", 0) < here.world_size() - 1 and time.monotonic() < ended:  # it may hold the store
                time.sleep(0.05)
    return code


def _follow(follow: Callable[[Path], None]) -> int:
    here, store = environment(), _store()
    assert here is not None
    failed = False
    try:
        _wait(store, "run", "code")
        if store.check(["run"]):
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # rank 0 says it
                _connect()
                follow(Path(store.get("run").decode()))
        _wait(store, "code")
    except KeyboardInterrupt:
        pass
    except Exception:
        # if rank 0 has failed or diverged, it says why, and this is only the consequence
        error, failed = traceback.format_exc(), True
    code = 1 if failed else 130
    with suppress(KeyboardInterrupt, RuntimeError):
        if _wait(store, "code", seconds=LEAVE):
            code, failed = json.loads(store.get("code")), False
        store.add("left", 1)
    if failed:
        print(f"torchimplicit: process {here.global_rank()} of {here.world_size()} failed:\n{error}", file=sys.stderr)
    return code


def _wait(store: Store, *keys: str, seconds: float = float("inf")) -> bool:
    """Wait until one of the keys is set. Signals are handled meanwhile, which ``Store.wait`` would not do."""
    ended = time.monotonic() + seconds
    while not any(store.check([key]) for key in keys):
        if time.monotonic() > ended:
            return False
        time.sleep(0.05)
    return True


@cache
def _store() -> Store:
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    here = environment()
    assert here is not None
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = here.main_address, str(here.main_port)
    store, *_ = next(iter(rendezvous("env://", here.global_rank(), here.world_size())))
    # torchrun starts processes anew in the same store
    return PrefixStore(f"torchimplicit/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _connect() -> None:
    """Make the group of processes, which Lightning then uses: gloo for CPU tensors and NCCL for those on GPUs."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    here = environment()
    assert here is not None
    torch.distributed.init_process_group(
        store=PrefixStore("group", _store()),
        rank=here.global_rank(),
        world_size=here.world_size(),
        timeout=timedelta(minutes=30),
    )
