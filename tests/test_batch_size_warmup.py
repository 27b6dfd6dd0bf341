"""Batches that grow, as a user runs them: any number of ranks and any interruption sees the same steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "config_files" / "config_lorem_ipsum.yaml"
STAGES = "{component: batch_size.stages, stages: [{from_step: 0, samples: 4}, {from_step: 3, samples: 8}, "
STAGES += "{from_step: 6, samples: 16}]}"
OPTIONS = ["trainer.schedule={component: schedule.constant}", "trainer.log_every=1", "trainer.checkpoints.every=4"]
OPTIONS += ["trainer.batches.samples_per_step=16", "trainer.batches.micro_batch_size=2"]
SAMPLES = [4, 8, 12, 20, 28, 36, 52, 68]


def steps(folder: Path) -> list[tuple[int, int, float]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["samples"], r["tokens"], r["loss"]) for r in records if r["event"] == "step_logged"]


def train(run, folder: Path, count: int, warmup: str = STAGES):
    options = [*OPTIONS, f"settings.steps={count}", f"trainer.batches.warmup={warmup}"]
    return run("run", CONFIG, "--folder", folder, *options)


@pytest.mark.slow
def test_an_interrupted_warmup_goes_on_exactly(modalities, torchrun, tmp_path: Path) -> None:
    for count in (5, 8):
        done = train(modalities, tmp_path / "broken", count)
        assert done.returncode == 0, done.stderr
    done = train(modalities, tmp_path / "whole", 8)
    assert done.returncode == 0, done.stderr
    whole = steps(tmp_path / "whole")
    length = whole[0][1] // whole[0][0]
    assert [(samples, tokens) for samples, tokens, _ in whole] == [(count, count * length) for count in SAMPLES]
    assert steps(tmp_path / "broken") == whole
    done = train(lambda *arguments: torchrun(2, *arguments), tmp_path / "two", 8)
    assert done.returncode == 0, done.stderr
    assert [step[:2] for step in steps(tmp_path / "two")] == [step[:2] for step in whole]
    assert [loss for _, _, loss in steps(tmp_path / "two")] == pytest.approx([loss for _, _, loss in whole], rel=2e-4)


@pytest.mark.slow
def test_mistakes_are_found_before_training(modalities, tmp_path: Path) -> None:
    done = modalities("check", CONFIG, *OPTIONS, "settings.steps=8", f"trainer.batches.warmup={STAGES}")
    assert done.returncode == 0, done.stderr
    assert "at first" in done.stdout and "16 x" in done.stdout
    for warmup, problem in [
        (STAGES.replace("samples: 8", "samples: 7"), "nearest that work: 6 and 8"),
        (STAGES.replace("samples: 16", "samples: 32"), "the last stage has 32 samples per step"),
        ("{component: batch_size.linear, samples: 4, increment: 5, steps: 6}", "nearest to start with: 1 or 6"),
        ("{component: batch_size.stages, stages: [{from_step: 0, size: 4}]}", "trainer.batches.warmup.stages"),
    ]:
        done = modalities("check", CONFIG, *OPTIONS, f"trainer.batches.warmup={warmup}")
        assert done.returncode == 2, done.stdout
        assert problem in done.stderr
        assert "trainer.batches" in done.stderr
