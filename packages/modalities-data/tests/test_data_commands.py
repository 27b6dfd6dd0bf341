"""The command line: what it prints, how it ends, and what it does not load."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

from modalities_data.commands import data
from modalities_data.packed import verify

README = Path(__file__).parents[1] / "README.md"
BLOCKING = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError("not here: " + name)

sys.meta_path.insert(0, Block())
"""


def every_command(group: click.Group = data, path: tuple[str, ...] = ()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from every_command(command, (*path, name))
        else:
            yield (*path, name), command


@pytest.mark.parametrize(("path", "command"), list(every_command()), ids=lambda value: str(value)[:20])
def test_every_command_has_help_with_an_example_and_json(path, command) -> None:
    context = click.Context(command, info_name=path[-1])
    text = command.get_help(context)
    assert f"Example: modalities-data {' '.join(path)} " in text
    assert "--json" in text
    assert all(option.help for option in command.params if isinstance(option, click.Option))


def test_help_and_import_load_nothing_heavy(script) -> None:
    blocked = {"torch", "tokenizers", "fastokens", "numpy", "transformers", "pydantic"}
    code = BLOCKING.replace("{blocked}", repr(blocked)) + (
        "import modalities_data, modalities_data.components\n"
        "sys.argv = ['modalities-data', '--help']\n"
        "from modalities_data.__main__ import main\n"
        "main()\n"
    )
    done = script(code, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "train-tokenizer" in done.stdout


def test_everything_but_batches_works_without_torch(script, lorem_file, tokenizer_file, tmp_path) -> None:
    code = BLOCKING.replace("{blocked}", "{'torch', 'transformers'}") + (
        "from pathlib import Path\n"
        "from modalities_data.datasets import PackedDataset\n"
        "from modalities_data.__main__ import _run\n"
        "source, tokenizer, out = sys.argv[1:]\n"
        "sys.argv = ['modalities-data', 'pack', source, out, '--tokenizer', tokenizer, '--workers', '1']\n"
        "assert _run() == 0\n"
        "print(len(PackedDataset(Path(out), 128)))\n"
    )
    done = script(code, lorem_file, tokenizer_file, tmp_path / "out", timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 100


def test_help_takes_less_than_half_a_second_of_cpu(command) -> None:
    def children() -> float:
        times = os.times()
        return times.children_user + times.children_system

    spent = []
    for _ in range(3):
        before = children()
        assert command("--help").returncode == 0
        spent.append(children() - before)
    assert min(spent) < 0.5


def test_the_commands_of_the_readme(tmp_path, monkeypatch) -> None:
    """As they stand there, on a smaller text."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(\w+)\n(.*?)```", README.read_text(), flags=re.S)
    lines = [line.split("#")[0].split() for kind, text in blocks if kind == "bash" for line in text.splitlines()]
    commands = [words for words in lines if words[:1] == ["modalities-data"]]
    names = [words[1] for words in commands]
    assert names[:7] == ["corpus", "split", "train-tokenizer", "pack", "pack", "inspect", "verify"]
    if find_spec("jinja2") is None:
        commands = [words for words in commands if words[1] != "chat"]
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]
    Path("conversations.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    Path("chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    # The standard library would take most of the time: made-up text in its place.
    commands[0] = ["modalities-data", "corpus", "lorem", "corpus.jsonl", "--documents", "600"]
    summaries = []
    for words in commands:
        done = run_script(*words[1:], "--json")
        assert done.returncode == 0, done.stderr
        summaries.append(json.loads(done.stdout.splitlines()[-1]))
    assert summaries[0]["documents"] == summaries[1]["train"] + summaries[1]["held_out"] == 600
    assert summaries[3]["written"] == summaries[1]["train"] == summaries[5]["documents"]
    assert summaries[3]["fingerprint"] == summaries[5]["fingerprint"] == summaries[6]["fingerprint"]
    (python,) = (text for kind, text in blocks if kind == "python")
    done = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("(8, 513)"), done.stderr


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "modalities_data", *arguments], capture_output=True, text=True, timeout=120
    )


def test_inspect_shows_counts_and_documents(command, lorem_file, tokenizer_file, tmp_path) -> None:
    for tokenizer in (tokenizer_file, "bytes"):
        done = command("pack", lorem_file, tmp_path / "out", "--tokenizer", tokenizer, "--workers", 1, "--overwrite")
        assert done.returncode == 0 and "400 of 400 documents" in done.stdout, done.stderr
        shown = command("inspect", tmp_path / "out", "--documents", 2, "--characters", 20, "--json")
        summary = json.loads(shown.stdout)
        first = json.loads(lorem_file.read_text().splitlines()[0])["text"]
        assert summary["samples"]["0"] == first[:20] and set(summary["samples"]) == {"0", "399"}
        assert summary["accounting"]["written"] == 400
        assert first[:20] in shown.stderr and f"{summary['tokens']:,} in 1 shards" in shown.stderr
        assert command("inspect", tmp_path / "out", "--documents", 0).returncode == 0
    assert command("verify", tmp_path / "out").stdout.endswith("every checksum matches\n")


MISTAKES = {
    "no such file": (["pack", "none.jsonl", "out", "--tokenizer", "bytes"], 3, "none.jsonl: No such file"),
    "no such tokenizer": (["pack", "x.jsonl", "out", "--tokenizer", "none.json"], 2, "there is no tokenizer at"),
    "no tokenizer": (["pack", "x.jsonl", "out"], 2, "Missing option '--tokenizer'"),
    "wrong key": (["pack", "x.jsonl", "out", "--tokenizer", "bytes", "--key", "body"], 3, "x.jsonl:1: "),
    "unknown command": (["pakc"], 2, "pakc"),
    "vocabulary": (["train-tokenizer", "x.jsonl", "t.json", "--vocab-size", "12"], 2, "--vocab-size"),
    "existing file": (["corpus", "lorem", "x.jsonl", "--documents", "1"], 3, "x.jsonl exists already"),
    "no folder": (["verify", "none"], 3, "none is no folder"),
    "a file": (["inspect", "x.jsonl"], 3, "x.jsonl is no folder"),
    "too few": (["split", ".", "a", "b"], 3, "of 1 documents in ./x.jsonl"),
    "empty pattern": (["split", "*.txt", "a", "b"], 3, "*.txt: there is no such file"),
    "fraction": (["split", "x.jsonl", "a", "b", "--fraction", "7"], 2, "between 0 and 1"),
    "folder of output": (["corpus", "lorem", "x.jsonl/y", "--documents", "1"], 3, "x.jsonl"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_with_an_exit_code(command, tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    arguments, code, message = MISTAKES[name]
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["x.jsonl"]


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_with_130_and_the_job_can_be_taken_up(tmp_path, workers) -> None:
    line = json.dumps({"text": "many words " * 50}) + "\n"
    (tmp_path / "x.jsonl").write_text(line * 30_000)
    arguments = ["pack", "x.jsonl", "out", "--tokenizer", "bytes", "--workers", str(workers), "--range-bytes", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "modalities_data", *arguments],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # Whoever runs the tests in the background of a shell has SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / ".out.partial" / ".state" / "00002.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.strip()) == (130, "", "interrupted")
    assert not (tmp_path / "out").exists()
    done = subprocess.run(
        [sys.executable, "-m", "modalities_data", *arguments, "--json"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["shards_reused"] >= 3
    assert verify(tmp_path / "out").documents == 30_000
