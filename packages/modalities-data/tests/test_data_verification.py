"""Checksums beside the work: a flipped byte anywhere is found, once is enough, and nobody waits for it."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from modalities_core.errors import ConfigError, DataError
from modalities_data import packed, packed_writer, verification
from modalities_data.datasets import BestFitDataset, PackedDataset
from modalities_data.packed import PackedFolder, problems
from modalities_data.verification import Verification, check_stretch, stretches

BLOCK = 1000


class Owner:
    """What a dataset is to its verification."""


@pytest.fixture
def folder(write_folder, tmp_path, monkeypatch) -> Path:
    """Two shards with masks and sources, some blocks of 1000 bytes each; nothing has passed yet."""
    for module in (packed, packed_writer, verification):
        monkeypatch.setattr(module, "CHECKSUM_BLOCK", BLOCK)
    monkeypatch.setattr(verification, "_passed", set())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    rng = np.random.default_rng(0)
    shards = [[np.r_[rng.integers(1, 500, rng.geometric(0.05)), 0] for _ in range(count)] for count in (90, 60)]
    masks = [[rng.integers(0, 2, len(document)) for document in documents] for documents in shards]
    return write_folder(tmp_path / "packed", shards, masks)


@pytest.fixture
def in_background(monkeypatch) -> None:
    """As if the folder were large."""
    monkeypatch.setattr(verification, "AT_ONCE_BYTES", 0)


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """Which stretches were read."""
    found = []

    def counted(folder, stretch, on_read=lambda count: None):
        found.append(f"{stretch.file} {stretch.start}")
        check_stretch(folder, stretch, on_read)

    monkeypatch.setattr(verification, "check_stretch", counted)
    return found


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def finished(check: Verification) -> None:
    """Use the folder until all is known."""
    end = time.monotonic() + 30
    while not check._done:
        check.check()
        assert time.monotonic() < end
        time.sleep(0.001)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name != "manifest.json")


def test_stretches_are_every_byte_once(folder) -> None:
    for shard in PackedFolder(folder).manifest.shards:
        found = list(stretches(shard))
        sizes = {name: sum(one.end - one.start for one in found if one.file == name) for name in shard.files()}
        assert sizes == shard.files()
        assert sum(one.file.endswith(".bin") for one in found) == -(-shard.bytes // BLOCK) > 2


@pytest.mark.parametrize("number", range(8))
def test_a_flipped_byte_is_found_in_any_file(folder, number, in_background) -> None:
    path = files(folder)[number]
    place = (1, path.stat().st_size // 2, path.stat().st_size - 1)[number % 3]
    flip(path, place)
    check = Verification(PackedFolder(folder), "background", owner := Owner())
    start = place // BLOCK * BLOCK if path.suffix == ".bin" else 0
    with pytest.raises(DataError, match=rf"{path.name}: block {start // BLOCK}, bytes {start} to \d+") as caught:
        finished(check)
    assert "modalities-data verify" in caught.value.hint and caught.value.exit_code == 3
    with pytest.raises(DataError):  # and it stays so
        check.check()
    assert list(problems(folder)) and owner


@pytest.mark.parametrize("kind", [PackedDataset, BestFitDataset])
def test_datasets_stop_at_the_first_samples_of_a_small_folder(folder, kind) -> None:
    sound = kind(folder, 16)
    assert len(sound.gather(np.arange(3)).tokens) == 3
    flip(folder / "00001.mask", 5)
    with pytest.raises(DataError, match="00001.mask"):
        kind(folder, 16).gather(np.arange(3))
    assert len(kind(folder, 16, verify="none").gather(np.arange(3)).tokens) == 3
    assert len(sound.gather(np.arange(3)).tokens) == 3  # once is enough
    with pytest.raises(ConfigError, match="verify is background or none, not 'all'"):
        kind(folder, 16, verify="all")


def test_what_passed_is_read_once_until_it_changes(folder, read) -> None:
    for _ in range(2):
        Verification(PackedFolder(folder), "background", Owner()).check()
    first = len(read)
    assert first == len({*read}) == sum(1 for shard in PackedFolder(folder).manifest.shards for _ in stretches(shard))
    os.utime(folder / "00000.bin", ns=(1, 1))
    Verification(PackedFolder(folder), "background", Owner()).check()
    assert len(read) == 2 * first


def test_a_stamp_keeps_the_next_start_from_reading(folder, read, in_background, monkeypatch, tmp_path) -> None:
    before = sorted(folder.iterdir())
    folder.chmod(0o555)
    finished(Verification(PackedFolder(folder), "background", owner := Owner()))
    (stamp,) = (tmp_path / "cache" / "modalities" / "verified").iterdir()
    assert sorted(folder.iterdir()) == before and owner

    def count_of_next_start() -> int:
        read.clear()
        monkeypatch.setattr(verification, "_passed", set())  # another process
        finished(Verification(PackedFolder(folder), "background", owner))
        return len(read)

    assert count_of_next_start() == 0
    long_ago = time.time() - 86_400 * (verification.STAMP_DAYS + 1)
    os.utime(stamp, (long_ago, long_ago))
    assert count_of_next_start() > 0
    assert count_of_next_start() == 0
    old = stamp.with_name("old")
    old.touch()
    os.utime(old, (long_ago, long_ago))
    folder.chmod(0o755)
    os.utime(folder / "00001.idx", ns=(1, 1))
    assert count_of_next_start() > 0
    assert not old.exists() and stamp.exists()


def test_a_cache_that_cannot_be_written_is_no_error(folder, in_background, monkeypatch, tmp_path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    finished(Verification(PackedFolder(folder), "background", owner := Owner()))
    assert owner


def test_ranks_share_the_reading(folder, read, in_background, monkeypatch) -> None:
    alone = Verification(PackedFolder(folder), "background", Owner())
    alone._verify((0, 1), lambda count: None)
    everything = sorted(read)
    read.clear()
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        finished(Verification(PackedFolder(folder), "background", owner := Owner()))
        assert owner
    assert sorted(read) == everything


def test_the_thread_keeps_its_pace_and_ends_with_its_owner(folder, in_background, monkeypatch) -> None:
    monkeypatch.setattr(verification, "BYTES_PER_SECOND", 500)
    owner = Owner()
    check = Verification(PackedFolder(folder), "background", owner)
    began = time.monotonic()
    check.check()
    assert time.monotonic() - began < 1  # it waits, we do not
    thread = check._thread
    assert thread is not None and thread.is_alive()
    waiting = Verification(PackedFolder(folder), "background", other := Owner())
    waiting.check()
    del owner, other
    gc.collect()
    for one in (thread, waiting._thread):
        one.join(timeout=10)
        assert not one.is_alive()
    assert not check._done and verification._turn.acquire(blocking=False)
    verification._turn.release()


def test_a_file_that_lost_its_end_or_went_away_is_an_error(folder, in_background) -> None:
    opened, kept = PackedFolder(folder), (folder / "00001.bin").read_bytes()
    (folder / "00001.bin").write_bytes(kept[:-10])
    with pytest.raises(DataError, match=r"00001.bin ends 10 bytes before byte"):
        finished(Verification(opened, "background", owner := Owner()))
    (folder / "00001.bin").unlink()
    with pytest.raises(DataError, match=r"00001.bin: No such file"):
        finished(Verification(opened, "background", owner))


def test_what_is_found_after_the_last_samples_is_logged(folder, in_background, caplog) -> None:
    flip(folder / "00000.bin", 3)
    check = Verification(PackedFolder(folder), "background", owner := Owner())
    with verification._turn:  # nothing is found before the last use
        check.check()
    assert isinstance(check._thread, threading.Thread)
    check._thread.join(timeout=10)
    assert "00000.bin: block 0, bytes 0 to 1000: expected checksum" in caplog.text and owner
