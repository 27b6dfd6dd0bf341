"""A user's mistakes, each one message with its place, the right exit code, and no traceback; check and run alike."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import pytest

from modalities_cli.app import app
from modalities_cli.failures import guarded

ROOT = Path(__file__).resolve().parent.parent
GOOD = """\
version: 1
settings: {data: DATA, sequence_length: 32, steps: 4}
world: {component: world.auto}
model:
  component: model.decoder
  preset: nano
  vocab_size: 4096
  sequence_length: 32
trainer:
  component: trainer.default
  world: ${world}
  steps: ${settings.steps}
  executor: {component: executor.plain, model: "${model}", world: "${world}", loss: {component: loss.cross_entropy}}
  optimizer: {component: optimizer.adamw, model: "${model}", lr: 1e-3}
  schedule: {component: schedule.constant}
  batches:
    component: batches.shuffled
    dataset: {component: dataset.packed, path: "${settings.data}/train", sequence_length: "${settings.sequence_length}"}
    world: ${world}
    samples_per_step: 4
    micro_batch_size: 2
"""

MISTAKES = {
    "typo in a key": ("vocab_size: 4096", "vocab_sise: 4096", 2, r"model\.vocab_sise: .*mean `vocab_size`.*:7\)"),
    "wrong type": ("lr: 1e-3", "lr: fast", 2, r"trainer\.optimizer\.lr: must be a valid number.*:14\)"),
    "unknown component": ("optimizer.adamw", "optimizer.adam_w", 2, r"did you mean `optimizer\.adamw`.*:14\)"),
    "dangling reference": ('path: "${settings.data}', 'path: "${settings.date}', 2, r"nowhere.*`settings\.data`.*:18"),
    "circular reference": ("steps: 4}", "steps: ${trainer.steps}}", 2, r"round in a circle.*trainer\.steps"),
    "missing data file": ("data: DATA", "data: DATA/nowhere", 3, r"trainer\.batches\.dataset.*:18\).*nowhere"),
    "small vocabulary": ("vocab_size: 4096", "vocab_size: 300", 2, r"model\.vocab_size \(.*:7\): .*300"),
    "long sequences": ("  sequence_length: 32", "  sequence_length: 16", 2, r"model\.sequence_length \(.*:8\): .*16"),
    "impossible heads": ("preset: nano", "preset: nano\n  heads: 7", 2, r"model\.heads \(.*:7\): heads 7"),
    "batch that cannot be split": ("micro_batch_size: 2", "micro_batch_size: 3", 2, r"trainer\.batches.*3 x 1 = 3"),
    "unknown preset": ("preset: nano", "preset: nana", 2, r"model.*nano"),
    "negative learning rate": ("lr: 1e-3", "lr: -1.0", 2, r"trainer\.optimizer"),
    "no steps": ("steps: 4", "steps: 0", 2, r"trainer"),
    "duplicate key": ("preset: nano", "preset: nano\n  preset: nano", 2, r"stands twice, first in line 6.*:7\)"),
    "tab": ("  preset: nano", "\tpreset: nano", 2, r"tab.*:6\)"),
    "tag": ("preset: nano", "preset: !!python/object/apply:os.system [ls]", 2, r"tag .* is refused"),
    "plain data for an object": ("{component: schedule.constant}", "3", 2, r"expected Schedule.*schedule\.constant"),
}  # fmt: skip


def write(folder: Path, data: Path, old: str = "", new: str = "") -> Path:
    assert old in GOOD
    file = folder / "c.yaml"
    # The first line may be a reference in a flow mapping, which needs quotes.
    text = GOOD.replace(old, new, 1).replace("steps: ${trainer.steps}}", 'steps: "${trainer.steps}"}')
    file.write_text(text.replace("DATA", str(data)))
    return file


def test_the_good_document_passes(modalities, small_data: Path, tmp_path: Path) -> None:
    done = modalities("check", write(tmp_path, small_data))
    assert done.returncode == 0, done.stderr
    assert "no problems found" in done.stdout


def test_one_process_checks_a_run_for_many_devices(modalities) -> None:
    config, mesh = ROOT / "config_files" / "config_lorem_ipsum.yaml", ["world.tp=2", "world.dp_replicate=4"]
    done = modalities("check", config, *mesh)
    assert done.returncode == 0, done.stderr
    assert "devices, at least  8" in done.stdout
    done = modalities("check", config, *mesh, "--devices", 12)
    assert done.returncode == 2
    assert "dp_replicate 4 x tp 2 = 8 does not divide the 12 ranks of this run" in done.stderr


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found_by_check_and_run_alike(mistake: str, small_data: Path, tmp_path: Path, capsys) -> None:
    old, new, code, message = MISTAKES[mistake]
    file = write(tmp_path, small_data, old, new)
    # In this process, for speed; the test below has the command itself say the same.
    said = []
    for arguments in (["check", str(file)], ["run", str(file), "--folder", str(tmp_path / "run")]):
        found = guarded(lambda arguments=arguments: app(arguments, standalone_mode=False))
        said.append(capsys.readouterr().err)
        assert found == code, said
    assert said[0] == said[1]
    assert re.search(message, said[0], re.DOTALL), said[0]
    assert "Traceback" not in said[0]
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["typo in a key", "missing data file", "small vocabulary"])
def test_the_commands_themselves_say_so(mistake: str, modalities, small_data: Path, tmp_path: Path) -> None:
    old, new, code, message = MISTAKES[mistake]
    file = write(tmp_path, small_data, old, new)
    checked = modalities("check", file)
    done = modalities("run", file, "--folder", tmp_path / "run")
    assert (checked.returncode, done.returncode, done.stderr) == (code, code, checked.stderr)
    assert re.search(message, done.stderr, re.DOTALL), done.stderr


@pytest.mark.slow
def test_check_takes_less_than_three_seconds_of_cpu(modalities, small_data: Path, tmp_path: Path) -> None:
    import resource

    file = write(tmp_path, small_data, "vocab_size: 4096", "vocab_size: 300")
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        modalities("check", file)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 3


@pytest.mark.parametrize("at_once", [True, False])
def test_a_run_on_damaged_data_ends_with_code_3(at_once: bool, small_data: Path, tmp_path: Path, capsys, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(small_data, data)
    tokens = data / "train" / "00000.bin"
    content = bytearray(tokens.read_bytes())
    content[-1000] ^= 1  # still an id that the vocabulary has
    tokens.write_bytes(content)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if not at_once:
        monkeypatch.setattr("modalities_data.verification.AT_ONCE_BYTES", 0)
    # More steps than it could take before the checksums are known.
    arguments = ["run", str(write(tmp_path, data)), "--folder", str(tmp_path / "run"), "settings.steps=1000000"]
    assert guarded(lambda: app(arguments, standalone_mode=False)) == 3
    assert re.search(r"00000\.bin: block 0, bytes 0 to \d+: expected checksum", capsys.readouterr().err)


def test_unknown_commands_and_files(modalities, tmp_path: Path) -> None:
    done = modalities("chekc", "x")
    assert done.returncode == 2
    assert "did you mean `check`" in done.stderr
    done = modalities("run", tmp_path / "none.yaml")
    assert done.returncode == 2
    assert "no such configuration file" in done.stderr
    done = modalities("generate", tmp_path)
    assert done.returncode == 2
    assert "is not the folder of a run" in done.stderr


def test_components_can_be_listed_and_shown(modalities) -> None:
    listed = modalities("components")
    assert "optimizer.adamw" in listed.stdout
    assert modalities("components", "--kind", "schedule").stdout.count("schedule.") >= 6
    shown = modalities("components", "show", "optimizer.adamw")
    for word in ("lr", "float", "required", "weight_decay", "0.1"):
        assert word in shown.stdout
    wrong = modalities("components", "show", "optimizer.adamv")
    assert wrong.returncode == 2
    assert "did you mean `optimizer.adamw`" in wrong.stderr


def test_every_component_has_help_for_every_argument() -> None:
    from modalities_core.config.arguments import signature
    from modalities_core.registry import registry

    for entry in registry():
        if entry.distribution.startswith("modalities-") and not entry.distribution.endswith("plugin"):
            found = signature(entry.load())
            assert found.help, entry.name
            silent = [argument.name for argument in found.arguments.values() if not argument.help]
            assert not silent, f"{entry.name}: {silent}"


@pytest.mark.slow
def test_continue_extend_and_start_over(modalities, small_data: Path, tmp_path: Path) -> None:
    keep = "  checkpoints: {component: checkpoints.keep, format: {component: checkpoint_format.sharded}, every: 2}\n"
    keep += "  sinks: [{component: sink.console}]\n"
    file = write(tmp_path, small_data)
    file.write_text(file.read_text() + keep)
    folder = tmp_path / "run"
    first = modalities("run", file, "--folder", folder)
    assert first.returncode == 0, first.stderr
    again = modalities("run", file, "--folder", folder)
    assert again.returncode == 0, again.stderr
    assert "already done its 4 steps" in again.stdout
    more = modalities("run", file, "--folder", folder, "settings.steps=6")
    assert more.returncode == 0, more.stderr
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*"))[-1] == "step-00000006"
    fresh = modalities("run", file, "--folder", folder, "--fresh")
    assert fresh.returncode == 0, fresh.stderr
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*"))[-1] == "step-00000004"


def test_secrets_never_reach_the_run_folder(modalities, small_data: Path, tmp_path: Path) -> None:
    file = write(tmp_path, small_data, "steps: 4}", "steps: 4, note: 1}")
    before = time.time()
    done = modalities("run", file, "--folder", tmp_path / "run", "settings.note=${env:WANDB_API_KEY}")
    assert done.returncode == 2
    assert time.time() - before < 60
    assert not (tmp_path / "run").exists()
