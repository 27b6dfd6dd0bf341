"""A run of a wrapped model of transformers: ranks, checkpoints, export, and no network on the way."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from modalities_cli.wiring import run_roots
from modalities_core.config.document import parse
from modalities_core.config.graph import Graph
from modalities_core.errors import ConfigError
from modalities_core.registry import registry

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "config_files" / "huggingface.yaml"
SHORT = ["settings.sequence_length=32", "trainer.log_every=1", "trainer.schedule={component: schedule.constant}"]
SHORT += ["trainer.checkpoints.every=5", "trainer.batches.samples_per_step=8", "trainer.batches.micro_batch_size=2"]

OFFLINE = """
import socket, sys

def refuse(*arguments, **keywords):
    raise SystemExit(f"network: {arguments}")

socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from modalities_cli.__main__ import main
sys.argv = ["modalities", *sys.argv[1:]]
main()
"""


def losses(folder: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if record["event"] == "step_logged"}


def test_a_check_takes_no_network(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OFFLINE, "check", str(CONFIG)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no problems found" in done.stdout
    # The block works: what would fetch a name from the hub is refused before it tries.
    named = [*command, "model.model.model_type=null", "model.model.config=null", "model.model.path=Qwen/Qwen3-0.6B"]
    done = subprocess.run(named, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode != 0 and "hf download" in done.stderr and "network" not in done.stderr


@pytest.mark.parametrize("key", yaml.safe_load(CONFIG.read_text())["model"]["model"]["config"])
def test_each_key_of_config_misspelt_by_one_letter_is_refused(key: str) -> None:
    text = CONFIG.read_text().replace(f"      {key}:", f"      {key}x:")
    graph = Graph(parse(text, CONFIG.name, CONFIG.parent), registry(), run_roots())
    graph.check()
    with torch.device("meta"), pytest.raises(ConfigError, match=f"`{key}x`.*; did you mean `{key}`"):
        graph.build("model.model")


@pytest.mark.slow
def test_ranks_and_interruptions_change_nothing(torchrun, modalities, tmp_path: Path) -> None:
    straight, two, moved = tmp_path / "straight", tmp_path / "two", tmp_path / "moved"
    for ranks, folder, steps in ((1, straight, 10), (2, two, 10), (2, moved, 5), (1, moved, 10)):
        done = torchrun(ranks, "run", CONFIG, "--folder", folder, f"settings.steps={steps}", *SHORT)
        assert done.returncode == 0, done.stderr
    assert losses(straight)[10] < losses(straight)[1] - 0.1
    for other in (two, moved):
        assert losses(other).keys() == losses(straight).keys()
        for step, loss in losses(straight).items():
            assert math.isclose(loss, losses(other)[step], rel_tol=1e-5), (other, step)
    exported = tmp_path / "exported"
    done = modalities("export", moved, exported)
    assert done.returncode == 0, done.stderr
    assert "Qwen3ForCausalLM" in done.stdout and "logits equal those of transformers" in done.stdout
    weights = ["model.model.model_type=null", "model.model.config=null", f"model.model.path={exported}"]
    continued = modalities("run", CONFIG, "--folder", tmp_path / "continued", "settings.steps=1", *SHORT, *weights)
    assert continued.returncode == 0, continued.stderr
    assert losses(tmp_path / "continued")[1] < losses(straight)[8], "it goes on from the weights, not from random ones"
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported, local_files_only=True)
    theirs = model.generate(**tokenizer("Lorem", return_tensors="pt"), do_sample=False, max_new_tokens=8)
    ours = modalities("generate", moved, "--prompt", "Lorem", "--temperature", "0", "--max-new-tokens", "8", "--json")
    assert ours.returncode == 0, ours.stderr
    written = json.loads(ours.stdout)
    assert written["text"].encode() == bytes(theirs[0, -8:].tolist()), written
    assert torch.isfinite(model(theirs).logits).all()
