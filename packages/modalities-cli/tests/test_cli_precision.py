"""Precisions through the real loop: runs that are stopped go on bit for bit, and what they save can be read."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from export_parts import CONFIG, MODELS, invoke, our_model

from modalities_cli.app import app
from modalities_cli.run import train
from modalities_core.errors import ConfigError

SHORT = (
    "trainer.steps=8",
    "trainer.log_every=1",
    "trainer.checkpoints.every=4",
    "trainer.sinks=[{component: sink.jsonl}]",
)


@pytest.fixture
def config(data, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("DATA", str(data)).replace("MODEL", MODELS["llama"]))
    return path


def losses(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["event"] == "step_logged"]


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=pytest.mark.slow), "fp16"])
def test_a_run_that_is_continued_lands_on_the_same_bits(precision, config, tmp_path):
    options = (*SHORT, f"model.param_dtype={precision}")
    train(config, options, tmp_path / "whole")
    train(config, (*options, "trainer.steps=4", "trainer.schedule={component: schedule.constant}"), tmp_path / "parts")
    train(config, options, tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0]
    whole, parts = our_model(tmp_path / "whole"), our_model(tmp_path / "parts")
    for ours, theirs in zip(whole.parameters(), parts.parameters(), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
    states = [
        json.loads((tmp_path / name / "checkpoints" / "step-00000008" / "manifest.json").read_text())["state"][
            "executor"
        ]
        for name in ("whole", "parts")
    ]
    assert states[0] == states[1] and states[0]["precision"] == precision
    assert ("scaler" in states[0]) == (precision == "fp16")


def test_bfloat16_weights_are_saved_generated_from_and_exported(config, tmp_path):
    train(config, (*SHORT, "trainer.executor.precision=bf16_weights"), tmp_path / "run")
    model = our_model(tmp_path / "run")
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert invoke("generate", tmp_path / "run", "--prompt", "the cat", "--max-new-tokens", "4").startswith("the cat")
    pytest.importorskip("transformers", reason="an export is compared with it")
    invoke("export", tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_precision_that_contradicts_param_dtype_is_found_by_check(config):
    done = CliRunner().invoke(app, ["check", str(config), "trainer.executor.precision=bf16"])
    assert isinstance(done.exception, ConfigError) and "param_dtype to bf16" in done.exception.hint
