"""The batch file: a shell accepts it, and run with stand-ins for Slurm's programs it does what it says."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from modalities_cli.launch import launch
from modalities_cli.slurm import Job, batch_file
from modalities_core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "config_files" / "config_lorem_ipsum.yaml"
OVERRIDE = "trainer.sinks=[{component: sink.jsonl}]"


def program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def write(folder: Path, *options: str) -> str:
    words = [str(CONFIG), OVERRIDE, "--folder", str(folder / "my run's"), "--nproc", "8", "--nnodes", "4", *options]
    with pytest.raises(ConfigError, match="white space"):
        CliRunner().invoke(launch, [*words, "--slurm"], catch_exceptions=False)
    words[3] = str(folder / "run")
    done = CliRunner().invoke(launch, [*words, "--slurm"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert done.output.startswith(f"wrote {folder / 'run' / 'launch.sbatch'}")
    return (folder / "run" / "launch.sbatch").read_text()


@pytest.mark.parametrize("code", [0, 3, 75])
def test_the_file_does_what_it_says(tmp_path: Path, code: int) -> None:
    text = write(tmp_path, "--partition", "gpu", "--time", "12:00:00", "--account", "me")
    asked = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    expected = {"nodes=4", "ntasks-per-node=1", "gpus-per-node=8", "partition=gpu", "time=12:00:00", "account=me"}
    assert expected | {"requeue", "signal=USR1@120"} <= set(asked)
    assert (tmp_path / "run" / "logs").is_dir()
    script = tmp_path / "run" / "launch.sbatch"
    assert subprocess.run(["bash", "-n", str(script)], timeout=10).returncode == 0
    program(tmp_path, "scontrol", 'if [ "$1" = show ]; then echo n7; echo n8; else echo "$@" >> "$LOG"; fi')
    program(tmp_path, "srun", f'printf "%s\\n" "$@" > "$LOG"; exit {code}')
    slurm = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_NNODES": "4", "LOG": str(tmp_path / "log")}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", str(script)], env=os.environ | slurm | {"PATH": path}, timeout=10)
    assert done.returncode == code
    words = (tmp_path / "log").read_text().splitlines()
    assert ("requeue 41" in words) == (code == 75)
    assert words[words.index("--rendezvous") + 1] == "n7:20041"
    assert words[words.index("--nnodes") + 1] == "4"
    assert words[words.index("--") + 1 :][:2] == [str(CONFIG), OVERRIDE]


def test_submitting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [str(CONFIG), "--folder", str(tmp_path / "run"), "--nproc", "8", "--submit"]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no sbatch"):
        CliRunner().invoke(launch, words, catch_exceptions=False)
    program(tmp_path, "sbatch", 'echo "$@" > "${0%/*}/asked"; echo "1234;cluster"')
    done = CliRunner().invoke(launch, words, catch_exceptions=False)
    assert done.output.startswith("submitted job 1234: ")
    assert (tmp_path / "asked").read_text().split() == ["--parsable", str(tmp_path / "run" / "launch.sbatch")]
    program(tmp_path, "sbatch", "echo 'invalid partition' >&2; exit 1")
    with pytest.raises(ConfigError, match="invalid partition"):
        CliRunner().invoke(launch, words, catch_exceptions=False)


def test_a_job_needs_its_number_of_gpus_and_never_starts_over(tmp_path: Path) -> None:
    words = [str(CONFIG), "--slurm", "--nproc", "8", "--fresh", "--folder", str(tmp_path)]
    with pytest.raises(ConfigError, match="start over each time"):
        CliRunner().invoke(launch, words, catch_exceptions=False)
    with pytest.raises(ConfigError, match="how many GPUs"):
        CliRunner().invoke(launch, [str(CONFIG), "--slurm", "--folder", str(tmp_path)], catch_exceptions=False)
    with pytest.raises(ConfigError, match="white space"):
        batch_file(Job(1, 1, partition="a\n#SBATCH --nodes=9"), ["modalities"], CONFIG, (), tmp_path)
