"""On what a run was made."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata

import torch


@dataclass(frozen=True)
class Environment:
    """Software, machine and time."""

    torchimplicit_version: str
    torch_version: str
    python_version: str
    system: str
    device: str
    cores: int
    threads: int
    date: str

    @staticmethod
    def of(device: torch.device) -> Environment:
        """This process's, training on ``device``."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return Environment(
            torchimplicit_version=version(),
            torch_version=str(torch.__version__),
            python_version=platform.python_version(),
            system=f"{platform.system()} {platform.release()}",
            device=name,
            cores=cores,
            threads=torch.get_num_threads(),
            date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )


def version() -> str:
    """Of the library."""
    try:
        return metadata.version("torchimplicit")
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "source tree"
