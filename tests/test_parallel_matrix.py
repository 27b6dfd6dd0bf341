"""Runs on meshes of 2 and 4 ranks learn what one process learns from the same document, and go on under other meshes.

A case is a mesh, a feature that changes the document, and the mesh under which the run goes on from its middle. With
``-rP`` each says how near it came.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = Path(__file__).with_name("parallel_matrix_program.py")
MIDDLE = "checkpoints/step-00000005"
NEAR = 1e-5

UNCLIPPED = ["trainer.clip_norm=null", "trainer.batches.micro_batch_size=4"]
MIXTURE = (
    "decoder.feedforward={component: feedforward.mixture_of_experts, experts: 4, experts_per_token: 2, "
    "intermediate_size: 24, shared_intermediate_size: 24, balance_rate: 0.01}"
)
RECOMPUTED = "model.model={component: recomputation.%s, model: '${decoder}'}"
FEATURES: dict[str, list[str]] = {
    "plain": [],
    "unclipped": UNCLIPPED,
    "norm_1": ["trainer.norm_order=1", "trainer.clip_norm=5"],
    "norm_inf": ["trainer.norm_order=.inf", "trainer.clip_norm=0.02"],
    "accumulation": ["trainer.batches.micro_batch_size=1"],
    "masked": ["trainer.batches.dataset.masked=true", "trainer.evaluations.0.batches.dataset.masked=true"],
    "documents": ["trainer.batches.dataset.separate=true", "trainer.evaluations.0.batches.dataset.separate=true"],
    "tied": ["decoder.tied_embeddings=true"],
    "gqa": ["decoder.key_value_heads=2", "decoder.query_key_norm=head"],
    "projection_norm": ["decoder.query_key_norm=projection", "decoder.norm_placement=post"],
    "bias": ["decoder.bias=true", "decoder.norm=layer", "decoder.activation=gelu", "decoder.positions=absolute"],
    "soft_caps": [
        "decoder.attention_softcap=5.0",
        "decoder.logit_softcap=3.0",
        "decoder.norm_placement=sandwich",
        "decoder.attention_windows=[8, null]",
    ],
    "mixture": [MIXTURE],
    "losses": ["trainer.executor.loss.z_loss=0.01", "trainer.executor.loss.label_smoothing=0.1"],
    "recomputed": [RECOMPUTED % "blocks"],
    "selective": [RECOMPUTED % "selective"],
    "muon": [*UNCLIPPED, "trainer.optimizer={component: optimizer.muon, model: '${model}', lr: 1e-2, eps: 1e-3}"],
    "compiled": ["trainer.executor.compile=blocks"],
}


class Case(NamedTuple):
    """What runs, and how it goes on.

    mesh: degrees of world.auto, as in ``tp 2 dp_shard 2``.
    feature: of ``FEATURES``.
    then: the mesh under which it goes on from its middle; empty for one process.
    schedule: of executor.pipeline; empty for executor.plain.
    more: further overrides of this run, but not of the single process.
    off: how far weights may be from those of one process; 0 where sums are made in the same order.
    """

    mesh: str
    feature: str
    then: str
    schedule: str = ""
    more: tuple[str, ...] = ()
    off: float = NEAR

    @property
    def name(self) -> str:
        return "-".join([self.mesh.replace(" ", "_"), *([self.schedule] if self.schedule else []), self.feature])


QUICK = [
    Case("dp_shard 2", "unclipped", "dp_replicate 2", off=0),
]
SLOW = [
    Case("dp_shard 2", "tied", "dp_replicate 2 dp_shard 2"),
    Case("dp_shard 2", "muon", "", off=0),
    Case("dp_shard 4", "masked", ""),
    Case("dp_shard 4", "norm_1", "dp_shard 2"),
    Case("dp_replicate 2", "norm_inf", "dp_shard 2"),
    Case("dp_replicate 2 dp_shard 2", "documents", "dp_shard 2"),
    Case("dp_shard 2", "accumulation", "dp_shard 4"),
]


def degrees(mesh: str) -> dict[str, int]:
    words = mesh.split()
    return {name: int(degree) for name, degree in zip(words[::2], words[1::2], strict=True)}


def overrides(mesh: str, schedule: str = "") -> list[str]:
    """What the document says for a mesh; a schedule is needed where it has stages."""
    found = [f"world.{name}={degree}" for name, degree in degrees(mesh).items()]
    return found


def ranks(mesh: str) -> int:
    """Of a launch; 0 is one process without a launcher. Experts have no ranks of their own."""
    return math.prod(degree for name, degree in degrees(mesh).items() if name != "ep") if mesh else 0


class Launcher:
    """``parallel_matrix_program.py``, started once for all cases."""

    def __init__(self) -> None:
        command = [sys.executable, str(PROGRAM)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
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


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture(scope="module")
def alone(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of one process's run of a feature, with its weights, made when it is first asked for."""
    parent = tmp_path_factory.mktemp("alone")

    def run(feature: str) -> Path:
        folder = parent / feature
        if not folder.exists():
            launcher.run("", folder, FEATURES[feature], weights=parent / f"{feature}.npz")
        return folder

    return run


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


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=case.name) for case in QUICK),
        *(pytest.param(case, id=case.name, marks=pytest.mark.slow) for case in SLOW),
    ],
)
def test_a_mesh_learns_what_one_process_learns(case: Case, launcher, alone, tmp_path: Path) -> None:
    reference = alone(case.feature)
    common = {"reference": f"{reference}.npz"}
    assert logged(reference)["loss", 10] < logged(reference)["loss", 1] - 0.2, "nothing is learned"
    options = [*FEATURES[case.feature], *overrides(case.mesh, case.schedule), *case.more]
    results = launcher.run(case.mesh, tmp_path / "whole", options, **common)
    assert all(result["sharded"] for result in results)
    off_loss, off = farthest(results, tmp_path / "whole", reference, first=0)
    options = [*FEATURES[case.feature], *overrides(case.then)]
    results = launcher.run(case.then, tmp_path / "then", options, copy=tmp_path / "whole" / MIDDLE, **common)
    off_loss_then, off_then = farthest(results, tmp_path / "then", reference, first=6)
    then = case.then or "one process"
    print(f"{case.name}: {off_loss:.0e} {off:.0e}; then {then}: {off_loss_then:.0e} {off_then:.0e}")
    assert off_loss <= NEAR and off <= case.off
    assert off_loss_then <= NEAR and off_then <= NEAR
