"""``modalities launch`` with real ranks: codes, checkpoints, logs and the root cause."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "config_files" / "config_lorem_ipsum.yaml"
OPTIONS = ("trainer.log_every=1", "trainer.checkpoints.every=5", "settings.steps=400")


def test_a_mistake_is_said_once_before_anything_starts(modalities, tmp_path: Path) -> None:
    done = modalities("launch", "--nproc", 2, CONFIG, "optimiser.lr=1", "--folder", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.count("there is no `optimiser.lr`") == 1, done.stderr
    assert not (tmp_path / "run").exists()
    done = modalities("launch", "--nproc", "all", CONFIG)
    assert done.returncode == 2
    assert "--nproc is 'all'" in done.stderr


def until_training(process, folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/step-*")):
        assert process.poll() is None, "it ended before it was interrupted"
        assert time.monotonic() < deadline, "it did not start to train"
        time.sleep(0.05)


def output(tmp_path: Path) -> str:
    return (tmp_path / "output-0.txt").read_text()


@pytest.mark.slow
def test_sigterm_saves_on_every_rank_and_gives_75(start_modalities, modalities, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start_modalities("launch", "--nproc", 2, CONFIG, "--folder", folder, *OPTIONS)
    until_training(process, folder)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=90) == 75, output(tmp_path)
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open() if '"step_logged"' in line]
    assert (folder / "checkpoints" / f"step-{max(steps):08}").is_dir(), "it did not save where it stopped"
    assert output(tmp_path).rstrip().splitlines()[-2].startswith("root cause: rank 0 on ")
    assert "exit code 75: preempted" in output(tmp_path)
    assert "asked to stop after step" in (folder / "logs" / "rank1.log").read_text()
    last = f"settings.steps={max(steps) + 20}"
    done = modalities("launch", "--nproc", 2, CONFIG, "--folder", folder, *OPTIONS[:2], last)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert (folder / "logs" / "rank1.log").read_text().count("--- ") == 2, "the first start's log is gone"


@pytest.mark.slow
def test_a_killed_rank_is_named_and_gives_6(start_modalities, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start_modalities("launch", "--nproc", 2, "--grace", 5, CONFIG, "--folder", folder, *OPTIONS)
    until_training(process, folder)
    found = re.search(r"rank 1 of 2, process (\d+)", (folder / "logs" / "rank1.log").read_text())
    assert found is not None
    os.kill(int(found[1]), signal.SIGKILL)
    assert process.wait(timeout=90) == 6, output(tmp_path)
    last = output(tmp_path).rstrip().splitlines()[-2:]
    assert last[0].startswith("root cause: rank 1 on ")
    assert "killed by SIGKILL" in last[0]
    assert last[1].endswith("rank1.log")


@pytest.mark.slow
def test_the_doctor_starts_ranks_that_measure_each_axis(modalities, torchrun, tmp_path: Path) -> None:
    done = modalities("doctor", "--comm", "--nproc", 2, "--json", "--cp", 2, "--ep", 2)
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    operations = {row["operation"] for row in value["collectives"]}
    assert operations == {"all_reduce", "all_gather", "reduce_scatter", "all_to_all"}
    assert {row["axis"] for row in value["collectives"]} == {"cp", "ep", "all"}
    assert len(value["compute_seconds"]) == 2
    wrong = modalities("doctor", "--comm", "--nproc", 2, "--dp-replicate", 3)
    assert wrong.returncode == 2
    assert "dp_replicate" in wrong.stderr
    config = Path(__file__).resolve().parent.parent / "config_files" / "llama_1b_fsdp.yaml"
    done = torchrun(2, "doctor", "--comm", "--config", config)
    assert "dp_shard" in done.stdout, done.stderr
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rank 1: matrix product") == 1, "not rank 0 alone has printed"
