"""What the tests of meshes share: launches from one process, and how far a run is from that of one process."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

PROGRAM = Path(__file__).with_name("parallel_matrix_program.py")
NEAR = 1e-5
MIDDLE = "checkpoints/step-00000005"


def degrees(mesh: str) -> dict[str, int]:
    words = mesh.split()
    return {name: int(degree) for name, degree in zip(words[::2], words[1::2], strict=True)}


def overrides(mesh: str, schedule: str = "") -> list[str]:
    """What the document says for a mesh, and, where it has stages, for their schedule."""
    found = [f"world.{name}={degree}" for name, degree in degrees(mesh).items()]
    if "pp" in degrees(mesh):
        found += ["trainer.executor.component=executor.pipeline", f"trainer.executor.schedule={schedule or '1f1b'}"]
    return found


def ranks(mesh: str) -> int:
    """Of a launch; 0 is one process without a launcher. Experts have no ranks of their own."""
    return math.prod(degree for name, degree in degrees(mesh).items() if name != "ep") if mesh else 0


class Launcher:
    """``parallel_matrix_program.py``, started once for all cases."""

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, str(PROGRAM)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | (environment or {})
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._read() == "ready"

    def run(self, mesh: str, folder: Path, overrides: list[str], **arguments) -> list[dict]:
        """What each rank of a run found; its folder must not be there yet."""
        job = {"ranks": ranks(mesh), "folder": str(folder), "overrides": overrides, "timeout": 120} | arguments
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job, default=str) + "\n")
        self.process.stdin.flush()
        answer = self._read()
        logs = "\n".join(f"rank {rank}\n{log}" for rank, log in answer["logs"].items())
        assert not any(answer["codes"]), f"exit codes {answer['codes']}\n{logs}"
        return answer["results"]

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait(10) == 0

    def _read(self):
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())


def logged(folder: Path) -> dict[tuple[str, int], float]:
    """Loss and gradient norm of each step, and each evaluation."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["event"] == "step_logged":
            found["loss", record["step"]] = record["loss"]
            found["norm", record["step"]] = record["gradient_norm"]
        elif record["event"] == "evaluated":
            found["held out", record["step"]] = record["loss"]
    return found


def farthest(results: list[dict], folder: Path, reference: Path, first: int) -> tuple[float, float]:
    """How far what was logged from the step ``first`` on, and the weights, are from those of one process."""
    expected = {key: value for key, value in logged(reference).items() if key[1] >= first}
    measured = {key: value for key, value in logged(folder).items() if key[1] >= first}
    assert measured.keys() == expected.keys() and ("loss", 10) in measured
    offs: dict[str, float] = {}
    for result in results:
        for name, off in result["off"].items():
            offs[name] = max(off, offs.get(name, 0.0))
    with np.load(reference.with_name(f"{reference.name}.npz")) as arrays:
        assert offs.keys() == set(arrays.files), "no rank has the others"
    off_most = max(offs, key=lambda name: offs[name])
    print(f"farthest weights {off_most} {offs[off_most]:.1e}")
    return max(abs(measured[key] / expected[key] - 1) for key in expected), offs[off_most]
