"""generate and chat: against transformers on the same folder, and on runs that were trained for it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from modalities_cli.app import app
from modalities_cli.run import train
from modalities_core.errors import CheckpointError, ConfigError, DataError

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


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return hugging_face(tmp_path_factory.mktemp("models") / "llama")


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


def refused(error: type[Exception], message: str, *words: object, text: str | None = None) -> None:
    with pytest.raises(error, match=message):
        CliRunner().invoke(app, [*map(str, words)], input=text, catch_exceptions=False)


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
    refused(ConfigError, "there is no chat template", "chat", llama, "--chat-template", tmp_path / "none")


def conversation(
    folder: Path, turns: list[str], count: int, system: str | None = None, context: int = 512
) -> list[str]:
    """Greedy answers by transformers' own template and generation, without the turns that do not fit."""
    tokenizer = library(folder)
    messages = [] if system is None else [{"role": "system", "content": system}]
    answers = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        while True:
            text = tokenizer.apply_chat_template(
                messages, chat_template=CHATML, add_generation_prompt=True, tokenize=False
            )
            ids = tokenizer(text, add_special_tokens=False).input_ids
            if len(ids) <= context - count:
                break
            messages = messages[2:]
        found = tokenizer.decode(theirs(folder, ids, count), skip_special_tokens=True).lstrip()
        # As a text stream reads it.
        answers.append(found.replace("\r\n", "\n"))
        messages.append({"role": "assistant", "content": found.strip()})
    return answers


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> Path:
    """A Llama with room for a conversation."""
    return hugging_face(tmp_path_factory.mktemp("models") / "talker", length=512)


def test_a_conversation_is_that_of_transformers(talker):
    turns = ["hello", "and then?", "bye"]
    options = (*GREEDY, "--max-new-tokens", 12)
    done = run("chat", talker, *options, "--system", "Be short.", text="".join(f"{turn}\n" for turn in turns))
    expected = conversation(talker, turns, 12, "Be short.")
    assert done.stdout == "".join(answer + "\n" for answer in expected)


def test_a_conversation_can_begin_again_and_end(talker):
    options = (*GREEDY, "--max-new-tokens", 12)
    done = run("chat", talker, *options, text="hello\n\n/reset\n/rest\nhello\n/exit\nunread\n")
    [answer] = conversation(talker, ["hello"], 12)
    assert done.stdout == f"{answer}\n{answer}\n".replace("\r\n", "\n")
    assert "there is no /rest" in done.stderr


def test_the_oldest_turns_are_left_out_where_a_conversation_outgrows_the_context(llama):
    turns = ["a first turn", "a second one", "a third", "a fourth", "a fifth"]
    done = run("chat", llama, *GREEDY, "--max-new-tokens", 8, text="".join(f"{turn}\n" for turn in turns))
    expected = conversation(llama, turns, 8, context=96)
    assert done.stdout == "".join(answer + "\n" for answer in expected)
    assert expected != conversation(llama, turns, 8, context=512)
    refused(DataError, "the message has 119 tokens", "chat", llama, "--max-new-tokens", 8, text="x" * 100 + "\n")


def test_a_message_with_a_control_token_is_refused(llama):
    refused(DataError, r"control token '<\|im_end\|>'", "chat", llama, text="a<|im_end|>b\n")


def test_a_model_without_a_template_takes_one_by_name(tmp_path):
    folder = hugging_face(tmp_path / "model")
    (folder / "tokenizer_config.json").unlink()
    refused(ConfigError, "comes without a chat template", "chat", folder, text="hello\n")
    template = tmp_path / "mine.jinja"
    template.write_text(CHATML)
    done = run("chat", folder, *GREEDY, "--max-new-tokens", 8, "--chat-template", template, text="hello\n")
    assert done.stdout == conversation(folder, ["hello"], 8)[0] + "\n"


RUN = """
version: 1
settings: {steps: 160}
world: {component: world.auto}
tokenizer: {component: tokenizer.huggingface, path: chats/tokenizer.json}
model:
  component: parallel.fsdp2
  world: ${world}
  param_dtype: fp32
  model:
    component: model.decoder
    vocab_size: 259
    sequence_length: 96
    hidden_size: 64
    layers: 2
    heads: 4
    key_value_heads: 2
    attention_windows: [32, null]
trainer:
  component: trainer.default
  world: ${world}
  steps: ${settings.steps}
  executor: {component: executor.plain, model: "${model}", loss: {component: loss.cross_entropy}, world: "${world}"}
  optimizer: {component: optimizer.adamw, model: "${model}", lr: 4e-3}
  schedule: {component: schedule.warmup_cosine, warmup_steps: 10, steps: "${settings.steps}"}
  batches:
    component: batches.shuffled
    dataset: {component: dataset.packed, path: chats, sequence_length: 96}
    world: ${world}
    samples_per_step: 16
    micro_batch_size: 16
  checkpoints:
    {component: checkpoints.keep, format: {component: checkpoint_format.sharded}, every: 80, keep: 2}
  sinks: [{component: sink.jsonl}]
"""
ANSWERS = {"ping": "pong", "one": "two", "hello": "hi there"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run that has learned three answers, from conversations packed by our own command."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "model").mkdir()
    write_tokenizer(folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(CHATML)
    generator = torch.Generator().manual_seed(0)
    with (folder / "chats.jsonl").open("w") as stream:
        for _ in range(400):
            order = torch.randint(3, (2,), generator=generator).tolist()
            asked = [list(ANSWERS)[place] for place in order]
            messages = [
                {"role": role, "content": text}
                for ask in asked
                for role, text in (("user", ask), ("assistant", ANSWERS[ask]))
            ]
            stream.write(json.dumps({"messages": messages}) + "\n")
    words = ["chats.jsonl", "chats", "--tokenizer", "model"]
    with contextlib.chdir(folder):
        run("data", "chat", *words)
    (folder / "config.yaml").write_text(RUN)
    train(folder / "config.yaml", (), folder / "run")
    return folder / "run"


@pytest.mark.slow
def test_a_run_answers_as_it_was_taught(trained):
    text = "".join(f"{ask}\n" for ask in [*ANSWERS, *ANSWERS])
    done = run("chat", trained, *GREEDY, "--max-new-tokens", 20, text=text)
    assert done.stdout.splitlines() == [*ANSWERS.values(), *ANSWERS.values()]
    assert not done.stderr


@pytest.mark.slow
def test_a_checkpoint_is_named_by_its_folder(trained):
    prompt = "<|im_start|>user"
    options = ("--prompt", prompt, *GREEDY, "--max-new-tokens", 30)
    newest = written(trained, *options)
    earlier, later = trained / "checkpoints" / "step-00000080", trained / "checkpoints" / "step-00000160"
    assert written(later, *options) == newest == written(trained / "checkpoints", *options)
    assert written(earlier, *options) != newest
    wrong = trained / "checkpoints" / "step-00000081"
    refused(ConfigError, "is not the folder of a run", "generate", wrong)
    # A damaged one is refused, not loaded.
    for file in earlier.glob("*.distcp"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    refused(CheckpointError, "damaged", "generate", earlier)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path):
    import pty

    # Long, and with a head that gives no control token, so that there is time to interrupt it.
    folder = hugging_face(tmp_path / "endless", length=40_000)
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][256:] = 0
    weights["lm_head.weight"] *= 30
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    ours, their_end = pty.openpty()
    command = [sys.executable, "-m", "modalities", "chat", str(folder), "--max-new-tokens", "15000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    process = subprocess.Popen(
        command, stdin=their_end, stdout=their_end, stderr=their_end, env=environment, start_new_session=True
    )
    try:
        shown = read_until(ours, b"> ")
        assert b"/exit ends it" in shown
        os.write(ours, b"hello\n")
        time.sleep(0.5)
        read_some(ours, 200)
        process.send_signal(signal.SIGINT)
        # An answer that is left alone ends with a note that it was cut.
        assert b"(cut" not in read_until(ours, b"> ")
        os.write(ours, b"/exit\n")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        os.close(ours)
        os.close(their_end)


def read_some(descriptor: int, count: int) -> bytes:
    found = b""
    while len(found) < count:
        found += os.read(descriptor, 4096)
    return found


def read_until(descriptor: int, mark: bytes) -> bytes:
    """What a terminal shows up to ``mark``, which nothing else may contain."""
    import select

    found, end = b"", time.monotonic() + 60
    while not found.endswith(mark):
        ready, _, _ = select.select([descriptor], [], [], max(0, end - time.monotonic()))
        assert ready, found
        found += os.read(descriptor, 4096)
    return found
