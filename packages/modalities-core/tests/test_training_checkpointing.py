"""Whatever happens during a save, a valid checkpoint is there; whatever happens to a file, it is noticed."""

import contextlib
import json
import math
import os
import shutil

import pytest
import torch
from training_parts import TinyModel, TorchFiles

from modalities_core.errors import CheckpointError, ConfigError, ResourceError
from modalities_core.training.checkpointing import (
    Checkpoints,
    expected_bytes,
    load_checkpoint,
    state_bytes,
)
from modalities_core.training.lineage import Shelf, newest_valid, step_folders
from modalities_core.training.manifest import Manifest, read_manifest
from modalities_core.training.optim import adamw
from modalities_core.training.world import Alone


class Writer:
    """A model with state, and a line of training that saves it."""

    def __init__(self, folder, keep=3, format=None):
        self.shelf = Shelf(folder)
        self.checkpoints = Checkpoints(format or TorchFiles(), every=1, keep=keep)
        self.world = Alone("cpu")
        self.model = TinyModel()
        self.optimizer = adamw(self.model, lr=0.1)
        self.parent = None
        for value in self.model.parameters():
            value.grad = torch.ones_like(value)
        self.optimizer.step()

    def save(self, step, **changes):
        with torch.no_grad():
            self.model.hidden.bias.fill_(float(step))
        numbers = {"samples": 8 * step, "tokens": 48 * step, "samples_per_step": 8, "commit": 0, "world_size": 1}
        draft = Manifest(
            step=step, parent_step=self.parent, seed=0, data_fingerprint="f", state={"pi": math.pi}, **numbers
        )
        written = self.checkpoints.save(self.shelf, self.world, self.model, self.optimizer, draft)
        self.parent = step
        return written.checkpoint, written.warnings

    def resume(self, at_step=None):
        found, warnings = self.checkpoints.find(self.shelf, self.world, at_step)
        moved = self.checkpoints.load(self.shelf, self.world, self.model, self.optimizer, found)
        self.parent = found.manifest.step
        return found.manifest.step, [*warnings, *moved]


def steps(folder):
    return list(step_folders(folder))


def value(folder):
    found = newest_valid(folder)
    model = TinyModel()
    load_checkpoint(found.folder, TorchFiles(), model)
    assert set(model.hidden.bias.tolist()) == {float(found.manifest.step)}
    return found.manifest.step


def flip(path, place=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 0x10
    path.write_bytes(data)


def test_manifest_tells_what_is_in_the_folder(tmp_path):
    saved, warnings = Writer(tmp_path).save(5)
    assert warnings == []
    assert saved.folder == tmp_path / "step-00000005"
    payload = json.loads((saved.folder / "manifest.json").read_text())
    assert set(payload["files"]) == {"model.pt", "more/optimizer.pt"}
    assert payload["files"]["model.pt"]["bytes"] == (saved.folder / "model.pt").stat().st_size
    assert payload["tensors"]["hidden.weight"] == {"shape": [8, 8], "dtype": "float32"}
    assert payload["state"]["pi"] == math.pi
    assert set(payload["versions"]) == {"modalities-core", "python", "torch"}
    assert read_manifest(saved.folder) == saved.manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005"]


class Crashes:
    """Lets the first calls into the operating system pass; from the next on the process is as good as dead.

    ``dead`` False: that one call fails and the later ones work again, as when a disk is full for a moment.
    """

    NAMES = ("replace", "fsync", "rename", "unlink", "rmdir", "mkdir", "open")

    class Dead(BaseException):
        pass

    def __init__(self, monkeypatch, survive, dead):
        self.survive = survive
        self.dead = dead
        self.calls = 0
        for name in self.NAMES:
            monkeypatch.setattr(os, name, self.wrapped(getattr(os, name)))

    def wrapped(self, function):
        def call(*args, **kwargs):
            self.calls += 1
            if self.calls > self.survive and self.dead:
                raise self.Dead
            if self.calls == self.survive + 1:
                raise OSError(28, "No space left on device")
            return function(*args, **kwargs)

        return call


def saved_twice(tmp_path, name):
    """A copy of a folder with steps 10 and 20, and a writer that goes on from there."""
    folder, original = tmp_path / name, tmp_path / "original"
    if not original.exists():
        writer = Writer(original)
        for step in (10, 20):
            writer.save(step)
    shutil.copytree(original, folder)
    writer = Writer(folder, keep=2)
    writer.parent = 20
    return writer, folder


@pytest.mark.parametrize("dead", [True, False])
def test_a_crash_at_every_call_of_a_save_leaves_a_valid_checkpoint(tmp_path, dead):
    writer, folder = saved_twice(tmp_path, "count")
    with pytest.MonkeyPatch.context() as patch:
        count = Crashes(patch, 10**9, dead)
        writer.save(30)
    assert count.calls > 10
    assert steps(folder) == [30, 20]
    seen = set()
    for survive in range(count.calls):
        writer, folder = saved_twice(tmp_path, f"{survive}")
        with pytest.MonkeyPatch.context() as patch:
            crash = Crashes(patch, survive, dead)
            with contextlib.suppress(Crashes.Dead, ResourceError):
                writer.save(30)
        assert crash.calls > survive
        found = value(folder)
        seen.add(found)
        assert found in (20, 30)
        # What a crash left behind neither counts nor stays.
        again = Writer(folder, keep=2)
        assert again.resume()[0] == found
        again.save(40)
        assert value(folder) == 40
        assert len(steps(folder)) == 2
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
        shutil.rmtree(folder)
    assert seen == {20, 30}


def test_a_flipped_bit_in_any_byte_of_the_manifest_is_noticed(tmp_path):
    saved, _ = Writer(tmp_path).save(5)
    path = saved.folder / "manifest.json"
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(CheckpointError, match="damaged"):
            read_manifest(saved.folder)
    path.write_bytes(good)
    assert read_manifest(saved.folder) == saved.manifest


@pytest.mark.parametrize("name", ["model.pt", "more/optimizer.pt", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip first", "flip middle", "flip last", "truncate", "grow", "empty", "remove"])
def test_any_damage_is_noticed_and_the_one_before_is_taken(tmp_path, name, harm):
    writer = Writer(tmp_path)
    for step in (10, 20):
        writer.save(step)
    path = tmp_path / "step-00000020" / name
    size = path.stat().st_size
    match harm:
        case "remove":
            path.unlink()
        case "truncate":
            os.truncate(path, size - 1)
        case "empty":
            os.truncate(path, 0)
        case "grow":
            path.write_bytes(path.read_bytes() + b"x")
        case _:
            flip(path, {"flip first": 0, "flip middle": size // 2, "flip last": size - 1}[harm])
    found, warnings = Shelf(tmp_path).newest_valid()
    assert found.manifest.step == 10
    assert len(warnings) == 1
    assert "step-00000020" in warnings[0]
    assert path.name in warnings[0]
    assert value(tmp_path) == 10
    with pytest.raises(CheckpointError, match=path.name):
        load_checkpoint(tmp_path / "step-00000020", TorchFiles(), TinyModel())
    with pytest.raises(CheckpointError, match=path.name):
        Writer(tmp_path).resume(at_step=20)
    flip(tmp_path / "step-00000010" / "model.pt")
    with pytest.raises(CheckpointError, match="none of the checkpoints") as caught:
        newest_valid(tmp_path)
    assert caught.value.exit_code == 4


def test_no_checkpoint_is_none(tmp_path):
    assert newest_valid(tmp_path) is None
    assert newest_valid(tmp_path / "not there") is None
    (tmp_path / ".step-00000010.tmp").mkdir()
    (tmp_path / "something else").mkdir()
    assert newest_valid(tmp_path) is None


def test_a_manifest_does_not_reach_outside_of_its_folder(tmp_path):
    from dataclasses import replace

    from modalities_core.training.manifest import FileRecord, write_manifest

    saved, _ = Writer(tmp_path).save(5)
    for name in ("../other", "/etc/hostname", "a/../../b", "", "a\\b"):
        write_manifest(saved.folder, replace(saved.manifest, files={name: FileRecord(1, "0" * 16)}))
        with pytest.raises(CheckpointError, match="not a path inside"):
            read_manifest(saved.folder)


def test_later_schema_and_moved_folder_are_refused(tmp_path):
    from dataclasses import replace

    from modalities_core.training.manifest import write_manifest

    saved, _ = Writer(tmp_path).save(5)
    saved.folder.rename(tmp_path / "step-00000006")
    with pytest.raises(CheckpointError, match="of step 5"):
        newest_valid(tmp_path)
    write_manifest(tmp_path / "step-00000006", replace(saved.manifest, schema_version=99))
    with pytest.raises(CheckpointError, match="schema 99"):
        newest_valid(tmp_path)


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_retention_keeps_the_newest(tmp_path, keep):
    writer = Writer(tmp_path, keep=keep)
    for step in range(1, 6):
        writer.save(step)
        assert steps(tmp_path) == list(range(step, max(0, step - keep), -1))


def test_retention_after_a_rollback(tmp_path):
    writer = Writer(tmp_path, keep=9)
    for step in (10, 20, 30):
        writer.save(step)
    writer = Writer(tmp_path, keep=2)
    assert writer.resume(at_step=10) == (
        10,
        [f"moved step-000000{step} to abandoned/, since the run goes on from step 10" for step in (30, 20)],
    )
    writer.save(15)
    assert steps(tmp_path) == [15, 10]
    assert steps(tmp_path / "abandoned") == [30, 20]
    assert value(tmp_path) == 15


def test_a_line_that_was_not_moved_is_not_chosen_either(tmp_path):
    writer = Writer(tmp_path, keep=9)
    for step in (10, 20, 30):
        writer.save(step)
    writer.parent = 10  # as if moving had been forgotten
    writer.save(15)
    assert value(tmp_path) == 15
    flip(tmp_path / "step-00000015" / "model.pt")
    assert value(tmp_path) == 10
    flip(tmp_path / "step-00000010" / "model.pt")
    with pytest.raises(CheckpointError):
        newest_valid(tmp_path)


def test_torn_newer_checkpoints_do_not_cost_the_valid_ones(tmp_path):
    writer = Writer(tmp_path, keep=9)
    for step in (20, 25, 30, 40):
        writer.save(step)
    (tmp_path / "step-00000030" / "manifest.json").unlink()
    os.truncate(tmp_path / "step-00000040" / "model.pt", 100)
    writer = Writer(tmp_path, keep=2)
    step, warnings = writer.resume()
    assert step == 25
    assert len([text for text in warnings if "passed over" in text]) == 2
    writer.save(26)
    assert steps(tmp_path) == [26, 25]


def test_damaged_ones_do_not_count(tmp_path):
    writer = Writer(tmp_path, keep=2)
    for step in (10, 20):
        writer.save(step)
    flip(tmp_path / "step-00000020" / "model.pt")
    writer.save(30)
    assert steps(tmp_path) == [30, 20, 10]
    writer.save(40)
    assert steps(tmp_path) == [40, 30]


def test_the_same_step_again_sets_the_old_one_aside(tmp_path):
    for _ in range(3):
        Writer(tmp_path).save(10)
    assert steps(tmp_path) == [10]
    names = sorted(path.name for path in (tmp_path / "abandoned").iterdir())
    assert names == ["step-00000010", "step-00000010.1"]


def test_disk_too_small_is_told_before_writing(tmp_path, monkeypatch):
    writer = Writer(tmp_path)
    writer.save(10)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(ResourceError, match=r"takes 1\.1 MB, but the disk of .* has 1\.0 MB left") as caught:
        writer.save(20)
    assert caught.value.exit_code == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010"]
    assert value(tmp_path) == 10


@pytest.mark.parametrize(("number", "text"), [(28, "the disk is full"), (13, "could not write")])
def test_failure_while_writing_leaves_the_previous(tmp_path, number, text):
    class Failing(TorchFiles):
        def save(self, folder, model, optimizer):
            super().save(folder, model, optimizer)
            raise OSError(number, os.strerror(number))

    Writer(tmp_path).save(10)
    with pytest.raises(ResourceError, match=text):
        Writer(tmp_path, format=Failing()).save(20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010"]
    assert value(tmp_path) == 10


def test_deletion_that_fails_is_a_warning(tmp_path, monkeypatch):
    writer = Writer(tmp_path, keep=1)
    writer.save(10)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("modalities_core.training.lineage.shutil.rmtree", refuse)
    _, warnings = writer.save(20)
    assert len(warnings) == 1
    assert "could not delete" in warnings[0]
    assert steps(tmp_path) == [20]


def test_needed_bytes_are_those_of_weights_and_moments():
    model = TinyModel()
    optimizer = adamw(model, lr=0.1)
    weights = 4 * sum(value.numel() for value in model.parameters())
    assert (state_bytes(model, optimizer), expected_bytes(model, optimizer)) == (weights, 3 * weights)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    counters = 4 * len(list(model.parameters()))
    assert state_bytes(model, optimizer) == expected_bytes(model, optimizer) == 3 * weights + counters


@pytest.mark.parametrize("numbers", [{"every": 0}, {"every": 1, "keep": 0}])
def test_numbers_out_of_range_are_refused(numbers):
    with pytest.raises(ConfigError):
        Checkpoints(TorchFiles(), **numbers)
