"""chat: against transformers' templates and generation, at a terminal, and on a run that was taught to answer."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from generation_parts import CHATML, GREEDY, hugging_face, library, refused, run, theirs, write_tokenizer, written

from modalities_cli.run import train
from modalities_core.errors import CheckpointError, ConfigError, DataError


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return hugging_face(tmp_path_factory.mktemp("models") / "llama")


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
    refused(ConfigError, "there is no chat template", "chat", folder, "--chat-template", tmp_path / "none")
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
        # Python loses an interrupt that comes inside of a finalizer, and a user presses again.
        again = threading.Timer(2, process.send_signal, [signal.SIGINT])
        again.start()
        # An answer that is left alone ends with a note that it was cut.
        assert b"(cut" not in read_until(ours, b"> ")
        again.cancel()
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
