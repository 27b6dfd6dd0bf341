"""What only a CUDA device can show: the shipped configurations train there, sharded over all of them.

python -m pytest -m gpu
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "config_files" / "config_lorem_ipsum.yaml"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["event"] == "step_logged"]


def test_cuda_learns_what_the_cpu_learns(modalities, torchrun, tmp_path: Path) -> None:
    options = ["settings.steps=20", "trainer.log_every=1"]
    on_cpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = modalities("run", CONFIG, "--folder", tmp_path / "cpu", *options, env=on_cpu)
    assert done.returncode == 0, done.stderr
    done = torchrun(torch.cuda.device_count(), "run", CONFIG, "--folder", tmp_path / "cuda", *options)
    assert done.returncode == 0, done.stderr
    for cpu, cuda in zip(losses(tmp_path / "cpu"), losses(tmp_path / "cuda"), strict=True):
        assert math.isclose(cpu, cuda, rel_tol=2e-3)


def test_bf16_fsdp_trains_and_resumes(torchrun, tmp_path: Path) -> None:
    options = ["model.param_dtype=bf16", "trainer.checkpoints.every=10", "trainer.log_every=1"]
    options += ["trainer.schedule={component: schedule.constant}"]
    ranks = torch.cuda.device_count()
    for steps in (20, 40):
        done = torchrun(ranks, "run", CONFIG, "--folder", tmp_path, f"settings.steps={steps}", *options)
        assert done.returncode == 0, done.stderr
    found = losses(tmp_path)
    assert len(found) == 40
    assert found[-1] < found[0] - 1


def test_the_1b_configuration_fits_and_runs(torchrun, small_data: Path, tmp_path: Path) -> None:
    options = ["model.model.vocab_size=4096", "settings.steps=3", "settings.sequence_length=1024"]
    options += ["trainer.batches.samples_per_step=8", "trainer.schedule.warmup_steps=1", "trainer.log_every=1"]
    config = ROOT / "config_files" / "llama_1b_fsdp.yaml"
    ranks = torch.cuda.device_count()
    done = torchrun(ranks, "run", config, "--folder", tmp_path, f"settings.data={small_data}", *options)
    assert done.returncode == 0, done.stderr
    assert all(math.isfinite(loss) for loss in losses(tmp_path))


def test_memory_peaks_where_the_plan_says(modalities, torchrun, small_data: Path, tmp_path: Path) -> None:
    ranks = torch.cuda.device_count()
    options = [
        "model.model.vocab_size=4096",
        "settings.steps=3",
        "settings.sequence_length=2048",
        "trainer.log_every=1",
    ]
    options += [f"trainer.batches.samples_per_step={8 * ranks}", "trainer.schedule.warmup_steps=1"]
    options += [f"settings.data={small_data}", "trainer.executor.compile=none", "trainer.evaluations=[]"]
    config = ROOT / "config_files" / "llama_1b_fsdp.yaml"
    done = torchrun(ranks, "run", config, "--folder", tmp_path, *options)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    peak = max(record["memory"]["peak_allocated"] for record in records if record["event"] == "step_logged")
    planned = modalities("plan", config, *options, "--devices", ranks, "--json")
    assert planned.returncode == 0, planned.stderr
    assert math.isclose(json.loads(planned.stdout)["memory"]["total"], peak, rel_tol=0.15)


def test_offloaded_weights_train_and_are_saved_in_the_background(torchrun, tmp_path: Path) -> None:
    options = ["settings.steps=12", "trainer.log_every=1", "trainer.checkpoints.every=3"]
    ranks = torch.cuda.device_count()
    for folder, offload in (("host", "true"), ("device", "false")):
        more = ["--folder", tmp_path / folder, f"model.offload={offload}"]
        done = torchrun(ranks, "run", CONFIG, *more, *options)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / folder / "checkpoints" / "step-00000012").is_dir()
    for host, device in zip(losses(tmp_path / "host"), losses(tmp_path / "device"), strict=True):
        assert math.isclose(host, device, rel_tol=2e-3)
