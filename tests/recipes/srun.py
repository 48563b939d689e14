"""Slurm's ``srun`` as far as the tests need it: starts a command on two nodes, which are both this machine.

It passes SIGTERM on and ends with the largest exit code.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

NODES = 2


def main(command: list[str]) -> int:
    command = [word for word in command if not word.startswith("--kill-on-bad-exit")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tasks = [subprocess.Popen(command, env=_environment(rank, port)) for rank in range(NODES)]
    signal.signal(signal.SIGTERM, lambda number, frame: [task.send_signal(number) for task in tasks])
    return max(task.wait() for task in tasks)


def _environment(rank: int, port: int) -> dict[str, str]:
    given = {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NAME": "test",
        "SLURM_STEP_NUM_TASKS": str(NODES),
        "SLURM_NTASKS": str(NODES),
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": str(NODES),
        "SLURM_NODEID": str(rank),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return {**os.environ, **given}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
