"""A launch as a job of Slurm: a batch file a person can read, and its submission."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from modalities_core.errors import ConfigError

SCRIPT = """#!/bin/bash
{directives}

# Written by `modalities launch --slurm`. One task per node; each starts its own ranks.
set -euo pipefail

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
node0=${{hosts%%$'\\n'*}}
# By the job's number, so that two jobs on one node do not meet.
port=$((20000 + SLURM_JOB_ID % 20000))

code=0
srun --kill-on-bad-exit=0 {launch} \\
    --nnodes "$SLURM_NNODES" --nproc {ranks} --rendezvous "$node0:$port" \\
    --folder {folder} \\
    -- {words} || code=$?

# 75: asked to stop, and saved. The job goes on from there when it gets its nodes again.
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


class Job(NamedTuple):
    """What Slurm is asked for.

    nodes: how many.
    ranks_per_node: also the GPUs of each.
    partition, time, account: as sbatch takes them; None leaves them to the cluster's defaults.
    """

    nodes: int
    ranks_per_node: int
    partition: str | None = None
    time: str | None = None
    account: str | None = None


def batch_file(job: Job, launch: Sequence[str], config: Path, overrides: Sequence[str], folder: Path) -> str:
    """The text of the batch file.

    Args:
        job: what to ask for.
        launch: the words of ``modalities launch`` with options that do not depend on the job.
        config: of the run.
        overrides: of single values.
        folder: of the run; Slurm's own log goes to its ``logs``.

    Raises:
        ConfigError: a value would not stay on its line.
    """
    config, folder = config.resolve(), folder.resolve()
    asked = {
        "job-name": config.stem,
        "nodes": str(job.nodes),
        "ntasks-per-node": "1",
        "gpus-per-node": str(job.ranks_per_node),
        "partition": job.partition,
        "time": job.time,
        "account": job.account,
        "chdir": str(Path.cwd()),
        "output": str(folder / "logs" / "slurm-%j.log"),
        "open-mode": "append",
        "signal": "USR1@120",  # two minutes to save before the time is up
        "requeue": "",
    }
    for name, value in asked.items():
        if value is not None and any(character.isspace() for character in value):
            raise ConfigError(f"{value!r} cannot stand in a batch file as {name}: it has white space")
    lines = [f"#SBATCH --{name}" + (f"={value}" if value else "") for name, value in asked.items() if value is not None]
    return SCRIPT.format(
        directives="\n".join(lines),
        launch=shlex.join(launch),
        ranks=job.ranks_per_node,
        folder=shlex.quote(str(folder)),
        words=shlex.join([str(config), *overrides]),
    )


def submit(path: Path) -> str:
    """Hand the batch file to sbatch; the job's number.

    Raises:
        ConfigError: there is no sbatch, or it refuses.
    """
    program = shutil.which("sbatch")
    if program is None:
        raise ConfigError("there is no sbatch on this machine", hint=f"on a login node of the cluster: sbatch {path}")
    done = subprocess.run([program, "--parsable", str(path)], capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise ConfigError(f"sbatch refused {path}: {done.stderr.strip() or done.returncode}")
    return done.stdout.strip().partition(";")[0]
