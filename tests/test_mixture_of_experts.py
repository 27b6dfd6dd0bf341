"""A mixture of experts through the whole program: two ranks and one, interrupted and not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "config_files" / "config_lorem_ipsum.yaml"
MIXTURE = (
    "model.model.feedforward={component: feedforward.mixture_of_experts, experts: 8, experts_per_token: 2, "
    "intermediate_size: 64, shared_intermediate_size: 64, balance_rate: 0.01}"
)
OPTIONS = [MIXTURE, "trainer.log_every=1", "trainer.schedule={component: schedule.constant}"]
pytestmark = pytest.mark.slow


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["event"] == "step_logged"]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Parameters and buffers of the newest checkpoint."""
    from modalities_cli.wiring import open_run, trained_model

    model, _ = trained_model(open_run(folder), folder)
    return model.state_dict()


def test_two_ranks_learn_what_one_learns_and_balance_alike(torchrun, tmp_path: Path) -> None:
    for ranks in (1, 2):
        done = torchrun(ranks, "run", CONFIG, "--folder", tmp_path / str(ranks), "settings.steps=15", *OPTIONS)
        assert done.returncode == 0, done.stderr
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == 15 and one[-1] < one[0] - 0.3
    assert two == pytest.approx(one, rel=1e-4)
    one, two = tensors(tmp_path / "1"), tensors(tmp_path / "2")
    balances = [name for name in one if name.endswith("router.balance")]
    assert balances and one.keys() == two.keys()
    for name in balances:
        assert one[name].abs().max() >= 0.05 and torch.equal(one[name], two[name]), name


def test_a_continued_run_has_the_balance_of_a_straight_one(modalities, tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert modalities("run", CONFIG, "--folder", straight, "settings.steps=12", *OPTIONS).returncode == 0
    for steps in (5, 12):
        done = modalities("run", CONFIG, "--folder", broken, f"settings.steps={steps}", *OPTIONS)
        assert done.returncode == 0, done.stderr
    assert losses(broken) == losses(straight)
    one, other = tensors(straight), tensors(broken)
    assert all(torch.equal(one[name], other[name]) for name in one)
    listed = json.loads(next((broken / "checkpoints").glob("step-*12/manifest.json")).read_text())["tensors"]
    assert any(name.endswith("router.balance") for name in listed)
    assert not any(name.endswith("router.load") for name in listed)
