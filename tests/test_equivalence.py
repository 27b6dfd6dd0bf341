"""Runs that have to be equal: one rank and two, interrupted and not."""

from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "config_files" / "config_lorem_ipsum.yaml"
pytestmark = pytest.mark.slow


def losses(folder: Path) -> dict[int, float]:
    """Training loss by step, each step once."""
    found: dict[int, float] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["event"] == "step_logged":
            assert record["step"] not in found, "a step is recorded twice"
            found[record["step"]] = record["loss"]
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The parameters of the newest checkpoint."""
    from modalities_cli.wiring import open_run, trained_model

    model, _ = trained_model(open_run(folder), folder)
    return model.state_dict()


def test_two_ranks_learn_what_one_learns(torchrun, tmp_path: Path) -> None:
    options = ["settings.steps=50", "trainer.log_every=1"]
    for ranks in (1, 2):
        done = torchrun(ranks, "run", "--config_file_path", CONFIG, "--folder", tmp_path / str(ranks), *options)
        assert done.returncode == 0, done.stderr
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert list(one) == list(two) == list(range(1, 51))
    assert one[50] < one[1] - 0.5, "it has to learn something for the comparison to mean anything"
    for step, loss in one.items():
        assert math.isclose(loss, two[step], rel_tol=1e-5), step


def test_a_checkpoint_of_two_ranks_continues_on_one(torchrun, tmp_path: Path) -> None:
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    options = ["trainer.log_every=1", "trainer.checkpoints.every=5", "trainer.schedule={component: schedule.constant}"]
    assert torchrun(1, "run", CONFIG, "--folder", straight, "settings.steps=10", *options).returncode == 0
    assert torchrun(2, "run", CONFIG, "--folder", moved, "settings.steps=5", *options).returncode == 0
    assert torchrun(1, "run", CONFIG, "--folder", moved, "settings.steps=10", *options).returncode == 0
    assert losses(moved).keys() == losses(straight).keys()
    for step, loss in losses(straight).items():
        assert math.isclose(loss, losses(moved)[step], rel_tol=1e-5), step


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    number: signal.Signals, code: int, modalities, start_modalities, tmp_path: Path
) -> None:
    options = ["settings.steps=60", "trainer.log_every=1", "trainer.checkpoints.every=10", "model.model.dropout=0.1"]
    assert modalities("run", CONFIG, "--folder", tmp_path / "straight", *options).returncode == 0
    folder = tmp_path / "broken"
    process = start_modalities("run", CONFIG, "--folder", folder, *options)
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    before = losses(folder)
    assert 0 < len(before) < 60, "the interruption came too late to test anything"
    resumed = modalities("run", CONFIG, "--folder", folder, *options)
    assert resumed.returncode == 0, resumed.stderr
    assert losses(folder) == losses(tmp_path / "straight")
    straight, broken = weights(tmp_path / "straight"), weights(folder)
    assert straight.keys() == broken.keys()
    assert all(torch.equal(straight[name], broken[name]) for name in straight)
