"""A folder of Hugging Face's as the start of a run: the command, end to end, against transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from export_parts import invoke, our_model

from modalities_core.errors import CheckpointError

transformers = pytest.importorskip("transformers")


def test_import_starts_a_run_that_trains_on(runs, data, tmp_path) -> None:
    invoke("export", runs["llama"], tmp_path / "out", "--no-verify")
    output = invoke("import", tmp_path / "out", tmp_path / "start")
    assert "a LlamaForCausalLM of" in output and "logits equal those of transformers" in output
    config = tmp_path / "start" / "config.yaml"
    settings = (
        f"settings.data={data / 'packed'}",
        "settings.steps=2",
        "settings.warmup_steps=0",
        "settings.sequence_length=24",
        "trainer.sinks=[]",
    )
    invoke("check", config, *settings)
    invoke("run", config, "--folder", tmp_path / "run", *settings)
    before, after = our_model(runs["llama"]).state_dict(), our_model(tmp_path / "run").state_dict()
    moved = max((after[name][: len(value)] - value[: len(after[name])]).abs().max() for name, value in before.items())
    assert 0 < moved < 1e-3, "two small steps from where it stood"
    options = ("--prompt", "a dog", "--temperature", "0", "--max-new-tokens", "16")
    assert invoke("generate", runs["llama"], *options) == invoke("generate", tmp_path / "start", *options)
    # And from there out again.
    assert "as a LlamaForCausalLM" in invoke("export", tmp_path / "run", tmp_path / "again")


def test_import_copies_no_code_and_reads_old_names(runs, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    invoke("export", runs["gpt2"], tmp_path / "out", "--no-verify")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    old = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(old, tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "code.Model"}}))
    (tmp_path / "out" / "code.py").write_text("raise SystemExit")
    invoke("import", tmp_path / "out", tmp_path / "start", "--dtype", "bfloat16")
    names = {path.name for path in (tmp_path / "start").iterdir()}
    assert names >= {"config.json", "config.yaml", "model.safetensors", "tokenizer.json"} and "code.py" not in names
    assert "auto_map" not in json.loads((tmp_path / "start" / "config.json").read_text())
    written = load_file(tmp_path / "start" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(value.dtype == torch.bfloat16 for value in written.values())


def test_an_import_that_computes_something_else_is_not_made(runs, tmp_path, monkeypatch) -> None:
    from modalities_models.huggingface import common

    invoke("export", runs["llama"], tmp_path / "out", "--no-verify")
    monkeypatch.setitem(common.GATED_BY, "silu", "geglu")  # as if we read a setting wrong
    with pytest.raises(CheckpointError, match="the logits differ from those of transformers"):
        invoke("import", tmp_path / "out", tmp_path / "start")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command_ends_with_the_codes_it_promises(runs, tmp_path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "mamba"}')
    command = [sys.executable, "-m", "modalities_cli", "import", str(tmp_path / "hf"), str(tmp_path / "start")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 4 and "models of type `mamba` cannot be imported" in done.stderr
