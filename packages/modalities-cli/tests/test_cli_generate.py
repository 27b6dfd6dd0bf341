"""generate: against transformers on the same folder, every way to give prompts, and every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from generation_parts import GREEDY, hugging_face, library, refused, run, theirs, written

from modalities_core.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return hugging_face(tmp_path_factory.mktemp("models") / "llama")


PROMPTS = ["def f(", "", "a much longer prompt than the others", "été"]


def test_texts_are_those_of_transformers(llama):
    words = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    found = written(llama, *words, *GREEDY, "--max-new-tokens", 20, "--batch-size", 3)
    assert [entry["prompt"] for entry in found] == PROMPTS
    tokenizer = library(llama)
    for entry in found:
        # Where there is nothing to begin with, the token that begins a text.
        ids = tokenizer(entry["prompt"]).input_ids or [257]
        assert entry["tokens"] == theirs(llama, ids, 20, eos_token_id=[256])
        assert entry["text"] == tokenizer.decode(entry["tokens"], skip_special_tokens=True)
        assert entry["finish"] == ("length" if len(entry["tokens"]) == 20 else "end")
    streamed = run("generate", llama, "--prompt", PROMPTS[0], *GREEDY, "--max-new-tokens", 20).stdout
    assert streamed == PROMPTS[0] + found[0]["text"] + "\n"


def test_repetition_penalty_and_the_token_in_front_are_those_of_transformers(tmp_path):
    folder = hugging_face(tmp_path / "model", bos=True)
    options = (*GREEDY, "--max-new-tokens", 20, "--repetition-penalty", 1.7)
    [found] = written(folder, "--prompt", "ab", *options)
    ids = library(folder)("ab").input_ids
    assert ids[0] == 257
    assert found["tokens"] == theirs(folder, ids, 20, eos_token_id=[256], repetition_penalty=1.7)


def test_the_end_tokens_are_those_of_the_generation_config(tmp_path):
    folder = hugging_face(tmp_path / "model")
    [whole] = written(folder, "--prompt", "ab", *GREEDY, "--max-new-tokens", 12)
    end = whole["tokens"][5]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, end]}))
    [found] = written(folder, "--prompt", "ab", *GREEDY, "--max-new-tokens", 12)
    assert found["tokens"] == whole["tokens"][: whole["tokens"].index(end)]
    assert found["finish"] == "end"
    for name in ("generation_config.json", "config.json"):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, "eos_token_id": None}))
    # The usual name of the token is tried before asking.
    assert written(folder, "--prompt", "ab", *GREEDY, "--max-new-tokens", 12)[0]["tokens"] == whole["tokens"]
    text = (folder / "tokenizer.json").read_text().replace("<|endoftext|>", "<|other|>")
    (folder / "tokenizer.json").write_text(text)
    refused(ConfigError, "nothing in .* says which token ends a text", "generate", folder)


def test_every_way_to_give_prompts(llama, tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text("one\n\nthree\n")
    objects = tmp_path / "prompts.jsonl"
    objects.write_text("".join(json.dumps({"prompt": text, "id": 7}) + "\n" for text in ("one", "", "three")))
    options = ("--max-new-tokens", 6, "--seed", 5)
    found = written(llama, "--file", lines, *options)
    assert [entry["prompt"] for entry in found] == ["one", "", "three"]
    assert written(llama, "--file", objects, *options) == found
    assert written(llama, "--file", "-", *options, text="one\n\nthree\n") == found
    assert written(llama, "--prompt", "-", *options, text="one")[0] == found[0]
    # A prompt's sample depends on its own seed, not on the batch.
    assert written(llama, "--file", lines, *options, "--batch-size", 1) == found
    assert written(llama, "--prompt", "three", "--max-new-tokens", 6, "--seed", 7)[0] == found[2]
    plain = run("generate", llama, "--file", lines, *options).stdout
    assert plain == "---\n".join(entry["prompt"] + entry["text"] + "\n" for entry in found)


def test_texts_stop_where_they_should(llama):
    [whole] = written(llama, "--prompt", "stop", *GREEDY, "--max-new-tokens", 30)
    stop = whole["text"][4:6]
    [found] = written(
        llama, "--prompt", "stop", *GREEDY, "--max-new-tokens", 30, "--stop", stop, "--stop", "<|im_end|>"
    )
    assert found["text"] == whole["text"][: whole["text"].index(stop)]
    assert found["finish"] == "stop"
    assert found["tokens"] == whole["tokens"][: len(found["tokens"])]


def test_a_control_token_is_something_to_stop_at(llama):
    # So hot that each of 259 tokens is about as likely; each line has a seed of its own.
    words = (llama, "--file", "-", "--temperature", 1000, "--max-new-tokens", 90)
    free, stopped = (written(*words, *more, text="q\n" * 24) for more in ((), ("--stop", "<|im_start|>")))
    places = [entry["tokens"].index(257) if 257 in entry["tokens"] else None for entry in free]
    assert any(place is not None for place in places)
    for one, other, place in zip(free, stopped, places, strict=True):
        assert other["tokens"] == one["tokens"][:place]
        assert other["finish"] == ("end" if place is not None else one["finish"])


def test_a_prompt_that_the_model_cannot_see_whole_is_said(llama):
    done = run("generate", llama, "--prompt", "x" * 100, "--max-new-tokens", 1)
    assert done.stderr == "warning: the prompt has 100 tokens; the model sees the last 96 of them\n"


def test_what_does_not_work_is_said(llama, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(ConfigError, "is not the folder of a run", "generate", tmp_path / "empty")
    refused(ConfigError, "by --prompt or by --file", "generate", llama, "--prompt", "a", "--file", "-")
    refused(DataError, "none.txt cannot be read: No such file", "generate", llama, "--file", tmp_path / "none.txt")
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    refused(DataError, 'wrong.jsonl:2 is no JSON object with a text under "prompt"', "generate", llama, "--file", wrong)
    (tmp_path / "latin.txt").write_bytes(b"\xe9\n")
    refused(DataError, "latin.txt cannot be read", "generate", llama, "--file", tmp_path / "latin.txt")
    if not torch.cuda.is_available():
        refused(ConfigError, "no CUDA device", "generate", llama, "--device", "cuda")
