"""Small models of transformers' own making, what it writes with them, and our commands run in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from modalities_cli.app import app

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GREEDY = ("--temperature", "0")


def write_tokenizer(folder: Path, bos: bool = False) -> None:
    """One token per byte and three control tokens, as a tokenizer.json."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in SPECIALS])
    if bos:
        begin = ("<|im_start|>", made.token_to_id("<|im_start|>"))
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[begin]
        )  # fmt: skip
    made.save(str(folder / "tokenizer.json"))


def hugging_face(folder: Path, length: int = 96, bos: bool = False, **changed) -> Path:
    """A small Llama of transformers with its tokenizer and template, as its own library saves it."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=length, initializer_range=0.3, eos_token_id=256,
        bos_token_id=257, tie_word_embeddings=False, **changed,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder, bos)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": SPECIALS[0], "chat_template": CHATML}))
    return folder


def theirs(folder: Path, ids: list[int], count: int, **options) -> list[int]:
    """What transformers writes after ``ids``, without the end token."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    options = {"do_sample": False, "eos_token_id": [256, 258], "pad_token_id": 0, **options}
    found = model.generate(torch.tensor([ids]), max_new_tokens=count, **options)[0, len(ids) :].tolist()
    return found[:-1] if found[-1] in options["eos_token_id"] else found


def library(folder: Path):
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def run(*words: object, text: str | None = None):
    """The command's standard output and error."""
    done = CliRunner().invoke(app, [*map(str, words)], input=text, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def written(*words: object, text: str | None = None) -> list[dict]:
    return [json.loads(line) for line in run("generate", *words, "--json", text=text).stdout.splitlines()]


def refused(error: type[Exception], message: str, *words: object, text: str | None = None) -> None:
    with pytest.raises(error, match=message):
        CliRunner().invoke(app, [*map(str, words)], input=text, catch_exceptions=False)
