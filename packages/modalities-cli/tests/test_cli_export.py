"""A run to a folder of Hugging Face's and back: the commands, end to end, against transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from modalities_cli import export as exporting
from modalities_cli.app import app
from modalities_cli.run import train
from modalities_core.errors import CheckpointError, ConfigError

transformers = pytest.importorskip("transformers")

STEPS = 20
TEXTS = ["the cat sat on the mat", "a dog ran over the green hill", "birds sing where the river is wide"] * 60
CONFIG = """
version: 1
settings: {data: DATA}
tokenizer: {component: tokenizer.huggingface, path: "${settings.data}/tokenizer.json"}
world: {component: world.auto}
model:
  component: parallel.fsdp2
  world: ${world}
  param_dtype: fp32
  model: {component: model.decoder, MODEL}
trainer:
  component: trainer.default
  world: ${world}
  steps: 20
  executor: {component: executor.plain, model: "${model}", loss: {component: loss.cross_entropy}, world: "${world}"}
  optimizer: {component: optimizer.adamw, model: "${model}", lr: 1e-2}
  schedule: {component: schedule.constant}
  batches:
    component: batches.shuffled
    dataset: {component: dataset.packed, path: "${settings.data}/packed", sequence_length: 24}
    world: ${world}
    samples_per_step: 4
    micro_batch_size: 4
  checkpoints: {component: checkpoints.keep, format: {component: checkpoint_format.sharded}, every: 10}
  sinks: []
"""
SIZE = "vocab_size: 300, sequence_length: 32, hidden_size: 32, layers: 2, heads: 2, intermediate_size: 48"
MODELS = {
    "llama": f"{SIZE}, key_value_heads: 1, vocab_multiple: 64",
    "gemma2": f"{SIZE}, norm_placement: sandwich, activation: geglu, tied_embeddings: true,"
    " attention_windows: [6, null], attention_softcap: 20.0, logit_softcap: 10.0,"
    " embedding_multiplier: 5.656854249492381, norm_eps: 1e-6",
    "qwen3_moe": f"{SIZE}, query_key_norm: head, feedforward: {{component: feedforward.mixture_of_experts, experts: 4,"
    " experts_per_token: 2, intermediate_size: 24, balance_rate: 0.0}",
    "gpt2": "preset: gpt2, sequence_length: 32, hidden_size: 32, layers: 2, heads: 2, vocab_multiple: 128",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from modalities_data.prepare.pack import pack
    from modalities_data.tokenizers.huggingface import HuggingFaceTokenizer
    from modalities_data.tokenizers.train import train_tokenizer

    folder = tmp_path_factory.mktemp("data")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    train_tokenizer(iter(TEXTS), folder / "tokenizer.json", 300)
    pack(folder / "texts.jsonl", folder / "packed", HuggingFaceTokenizer(folder / "tokenizer.json"), workers=1)
    return folder


class Runs:
    """A run of each model, trained for 20 steps through the real loop when it is first asked for."""

    def __init__(self, data: Path, folder: Path) -> None:
        self.data, self.folder = data, folder

    def __getitem__(self, name: str) -> Path:
        if not (self.folder / name).exists():
            config = self.folder / f"{name}.yaml"
            config.write_text(CONFIG.replace("DATA", str(self.data)).replace("MODEL", MODELS[name]))
            train(config, (), self.folder / name)
        return self.folder / name


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(data, tmp_path_factory.mktemp("runs"))


def invoke(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def our_model(run: Path):
    from modalities_cli.wiring import open_run, trained_model

    return trained_model(open_run(run), run)[0].eval()


@torch.no_grad()
def greedy(model, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        ids = [*ids, int(model.head(model(torch.tensor([ids])))[0, -1].argmax())]
    return ids


@pytest.mark.parametrize(
    "name", [name if name == "llama" else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_a_trained_run_gives_the_same_logits_and_text_in_transformers(name, runs, tmp_path) -> None:
    output = invoke("export", runs[name], tmp_path / "out")
    assert f"the model of step {STEPS} as a" in output and "logits equal those of transformers" in output
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.config.model_type == name and theirs.config.vocab_size == (50257 if name == "gpt2" else 300)
    assert theirs.get_input_embeddings().weight.shape[0] == theirs.config.vocab_size

    ours = our_model(runs[name])
    ids = tokenizer("the cat")["input_ids"]
    assert ids[0] == theirs.generation_config.eos_token_id
    with torch.no_grad():
        torch.testing.assert_close(
            ours.head(ours(torch.tensor([ids]))), theirs(torch.tensor([ids])).logits, rtol=1e-5, atol=1e-5
        )
    written = theirs.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0].tolist()
    assert greedy(ours, ids, 12) == written
    if name == "llama":
        assert tokenizer.decode(written[len(ids) :]).startswith(" sat on the")


def test_generate_writes_the_same_from_run_and_export(runs, tmp_path) -> None:
    invoke("export", runs["llama"], tmp_path / "out", "--no-verify")
    options = ("--prompt", "a dog", "--temperature", "0", "--max-new-tokens", "16")
    assert invoke("generate", runs["llama"], *options) == invoke("generate", tmp_path / "out", *options)


def test_a_checkpoint_of_a_run_in_half_precision(runs, tmp_path) -> None:
    step = runs["llama"] / "checkpoints" / "step-00000010"
    output = invoke("export", step, tmp_path / "half", "--dtype", "bfloat16")
    assert "the model of step 10" in output and "of bfloat16" in output
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert model.dtype == torch.bfloat16


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


def test_an_export_that_computes_something_else_is_not_made(runs, tmp_path, monkeypatch) -> None:
    from modalities_models.huggingface import verifying

    real = verifying.our_logits
    monkeypatch.setattr(verifying, "our_logits", lambda *arguments: real(*arguments).roll(1, -1))
    with pytest.raises(CheckpointError, match="the logits differ") as caught:
        invoke("export", runs["llama"], tmp_path / "out")
    assert caught.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []


def test_refusals(runs, tmp_path, monkeypatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="exists already"):
        invoke("export", runs["llama"], tmp_path / "full", "--no-verify")
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        invoke("export", tmp_path / "full", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"Qwen3ForCausalLM cannot have query_key_norm none"):
        invoke("export", runs["llama"], tmp_path / "out", "--family", "qwen3", "--no-verify")
    with pytest.raises(ConfigError, match="did you mean `llama`"):
        invoke("export", runs["llama"], tmp_path / "out", "--family", "lama", "--no-verify")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="not installed") as caught:
        invoke("export", runs["llama"], tmp_path / "out")
    assert "--no-verify" in caught.value.hint
    assert "not verified" in invoke("export", runs["llama"], tmp_path / "out", "--no-verify")
    with pytest.raises(ConfigError, match="not installed"):
        invoke("import", tmp_path / "out", tmp_path / "start")


def test_a_damaged_checkpoint_is_not_exported(runs, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["llama"], run)
    file = next((run / "checkpoints" / "step-00000020").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        invoke("export", run / "checkpoints" / "step-00000020", tmp_path / "out")
    output = invoke("export", run, tmp_path / "out", "--no-verify")
    assert "the model of step 10" in output


def test_the_chat_template_beside_the_tokenizer_goes_along(runs, data, tmp_path) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    (data / "chat_template.jinja").write_text(template)
    try:
        invoke("export", runs["llama"], tmp_path / "out", "--no-verify")
    finally:
        (data / "chat_template.jinja").unlink()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|endoftext|>user: hi<|endoftext|>"
    (tmp_path / "other.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    invoke("export", runs["llama"], tmp_path / "second", "--no-verify", "--chat-template", tmp_path / "other.jinja")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "second")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<|endoftext|>hi"


def test_a_run_for_many_ranks_is_exported_by_one_process(runs, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["llama"], run)
    resolved = run / "config.resolved.yaml"
    resolved.write_text(resolved.read_text().replace("component: world.auto", "component: world.auto\n  dp_shard: 8"))
    assert "dp_shard: 8" in resolved.read_text()
    assert exporting.export_run(run, tmp_path / "out").class_name == "LlamaForCausalLM"


def test_the_bytes_tokenizer_is_exported_too(data, tmp_path) -> None:
    config = tmp_path / "bytes.yaml"
    text = CONFIG.replace(
        '{component: tokenizer.huggingface, path: "${settings.data}/tokenizer.json"}', "{component: tokenizer.bytes}"
    )
    config.write_text(
        text.replace("settings: {data: DATA}\n", "")
        .replace("MODEL", MODELS["llama"])
        .replace(
            '{component: dataset.packed, path: "${settings.data}/packed", sequence_length: 24}',
            "{component: dataset.lorem_ipsum, sequence_length: 24, samples: 80}",
        )
        .replace("steps: 20", "steps: 1")
    )
    train(config, (), tmp_path / "run")
    invoke("export", tmp_path / "run", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("né\n").input_ids == [256, *"né\n".encode()]
    assert tokenizer.decode(tokenizer("né 🙂\n").input_ids, skip_special_tokens=True) == "né 🙂\n"


def test_the_command_ends_with_the_codes_it_promises(runs, tmp_path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "mamba"}')
    command = [sys.executable, "-m", "modalities_cli", "import", str(tmp_path / "hf"), str(tmp_path / "start")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 4 and "models of type `mamba` cannot be imported" in done.stderr


def test_tensors_that_would_be_left_behind_are_refused(runs, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["llama"], run)
    resolved = run / "config.resolved.yaml"
    resolved.write_text(
        resolved.read_text().replace("key_value_heads: 1", "key_value_heads: 1\n    tied_embeddings: true")
    )
    with pytest.raises(CheckpointError, match=r"1 differ, such as head.weight"):
        invoke("export", run, tmp_path / "out")
