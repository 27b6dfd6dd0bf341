"""A run to a folder of Hugging Face's: the command, end to end, against transformers."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from export_parts import CONFIG, MODELS, STEPS, TEXTS, greedy, invoke, our_model

from modalities_cli import export as exporting
from modalities_cli.run import train
from modalities_core.errors import CheckpointError, ConfigError

transformers = pytest.importorskip("transformers")


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


def test_tensors_that_would_be_left_behind_are_refused(runs, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["llama"], run)
    resolved = run / "config.resolved.yaml"
    resolved.write_text(
        resolved.read_text().replace("key_value_heads: 1", "key_value_heads: 1\n    tied_embeddings: true")
    )
    with pytest.raises(CheckpointError, match=r"1 differ, such as head.weight"):
        invoke("export", run, tmp_path / "out")


def test_another_tokenizer_is_copied_as_it_is_and_named(data, tmp_path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    with (tmp_path / "pieces.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=40, hard_vocab_limit=False, minloglevel=2
        )
    text = CONFIG.replace(
        'tokenizer.huggingface, path: "${settings.data}/tokenizer.json"', "tokenizer.sentencepiece, path: pieces.model"
    )
    config = tmp_path / "pieces.yaml"
    config.write_text(
        text.replace("DATA", str(data)).replace("MODEL", MODELS["llama"]).replace("steps: 20", "steps: 1")
    )
    train(config, (), tmp_path / "run")
    output = invoke("export", tmp_path / "run", tmp_path / "out", "--no-verify")
    assert "its own file was copied (tokenizer.model)" in output
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (tmp_path / "pieces.model").read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 2
