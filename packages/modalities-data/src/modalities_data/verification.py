"""Checksums of packed folders, checked once beside their use: block by block, on a thread that does not hurry.

What passed is remembered outside the folder, by the files' inodes, sizes and times, so that the next start on the same
machine has nothing to do; after STAMP_DAYS it is checked again, for disks that lose bits.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import xxhash

from modalities_core.errors import ConfigError, DataError
from modalities_data.disk import user_errors
from modalities_data.manifest import Shard
from modalities_data.packed import PackedFolder
from modalities_data.packed_writer import CHECKSUM_BLOCK

Verify = Literal["background", "none"]
"""Whether the checksums of a packed folder are checked beside its use."""

AT_ONCE_BYTES = 128_000_000
"""A folder of so many bytes is checked whole before its first use: some hundredths of a second."""
BYTES_PER_SECOND = 256_000_000
"""How fast a larger one is read: a few hundredths of a core, and a share of any disk."""
READ_BYTES = 1 << 20
STAMP_DAYS = 30
HINT = "copy the file again from where it was whole, or pack it again; `modalities-data verify` lists all that is wrong"

log = logging.getLogger(__name__)

_passed: set[str] = set()
"""What passed in this process, as stamps are called."""
_turn = threading.Lock()
"""One folder at a time, however many datasets there are."""


class Stretch(NamedTuple):
    """Bytes ``start`` to ``end`` of a file and their checksum."""

    file: str
    start: int
    end: int
    checksum: str


def stretches(shard: Shard) -> Iterator[Stretch]:
    """Every byte of a shard once: the blocks of its tokens, its index and what lies beside them."""
    for block, checksum in enumerate(shard.block_checksums):
        start = block * CHECKSUM_BLOCK
        yield Stretch(f"{shard.name}.bin", start, min(start + CHECKSUM_BLOCK, shard.bytes), checksum)
    yield Stretch(f"{shard.name}.idx", 0, shard.index_bytes, shard.index_checksum)
    for suffix, sidecar in shard.sidecars().items():
        yield Stretch(f"{shard.name}.{suffix}", 0, sidecar.bytes, sidecar.checksum)


def check_stretch(folder: Path, stretch: Stretch, on_read: Callable[[int], None] = lambda count: None) -> None:
    """Read a stretch and compare its checksum.

    Args:
        folder: the packed folder.
        stretch: what to read.
        on_read: told how many bytes were read, after each READ_BYTES.

    Raises:
        DataError: it has another checksum, or cannot be read.
    """
    path = folder / stretch.file
    digest, buffer, left = xxhash.xxh3_64(), memoryview(bytearray(READ_BYTES)), stretch.end - stretch.start
    with user_errors(path), path.open("rb", buffering=0) as stream:
        stream.seek(stretch.start)
        while left:
            count = stream.readinto(buffer[: min(READ_BYTES, left)])
            if not count:
                raise DataError(f"{path} ends {left} bytes before byte {stretch.end}", hint=HINT)
            digest.update(buffer[:count])
            left -= count
            on_read(count)
    if digest.hexdigest() != stretch.checksum:
        place = f"block {stretch.start // CHECKSUM_BLOCK}, bytes {stretch.start} to {stretch.end}"
        raise DataError(f"{path}: {place}: expected checksum {stretch.checksum}, found {digest.hexdigest()}", hint=HINT)


class _Cancelled(Exception):
    """Nobody wants to know any more."""


class Verification:
    """Checks the folder of a dataset from its first use on; each process of a distributed run checks a share.

    Args:
        packed: the folder.
        how: ``background``, or ``none`` to check nothing.
        owner: when it goes, so does the thread.
    """

    def __init__(self, packed: PackedFolder, how: Verify, owner: object) -> None:
        """Start nothing yet.

        Raises:
            ConfigError: ``how`` is neither of its choices.
        """
        if how not in get_args(Verify):
            raise ConfigError(f"verify is background or none, not {how!r}", about=(owner, "verify"))
        self._folder, self._manifest = packed.folder, packed.manifest
        self._done = how == "none"
        self._error: DataError | None = None
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._began = self._read = 0.0
        weakref.finalize(owner, self.close)

    def check(self) -> None:
        """Called at every use: the first one starts the work, or does it where there is little.

        Raises:
            DataError: something was found that is not what the manifest says.
        """
        if self._done:
            return
        with self._lock:
            if self._thread is None and self._error is None and not self._done:
                self._start()
        if self._error is not None:
            raise DataError(self._error.message, hint=self._error.hint)

    def close(self) -> None:
        """Stop reading; what was found so far is still told."""
        self._stop.set()

    def _start(self) -> None:
        # A token has two bytes or more: thousands of shards need not be added up in the first call.
        few = 2 * self._manifest.tokens <= AT_ONCE_BYTES
        if few and sum(sum(shard.files().values()) for shard in self._manifest.shards) <= AT_ONCE_BYTES:
            self._verify((0, 1), lambda count: None)
        else:
            self._thread = threading.Thread(target=self._work, name="verification", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        """What the thread does: wait for its turn, and read a share at a gentle pace."""
        if sys.platform == "linux":  # a thread has a priority of its own there
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        with suppress(_Cancelled):
            while not _turn.acquire(timeout=0.5):
                if self._stop.is_set():
                    return
            try:
                self._began = time.monotonic()
                self._verify(_share(), self._paced)
            finally:
                _turn.release()
        if self._error is not None:
            log.error("%s", self._error)  # there may be no next use to raise it

    def _paced(self, count: int) -> None:
        self._read += count
        if self._stop.wait(max(0.0, self._began + self._read / BYTES_PER_SECOND - time.monotonic())):
            raise _Cancelled

    def _verify(self, share: tuple[int, int], on_read: Callable[[int], None]) -> None:
        """Every ``share[1]``-th stretch from number ``share[0]`` on, in the order of files."""
        number, of = share
        mine = [one for shard in self._manifest.shards for one in stretches(shard)][number::of]
        try:
            stamp = _stamp(self._folder, mine)
            if stamp not in _passed and not (self._thread and _stamped(stamp)):
                for stretch in mine:
                    check_stretch(self._folder, stretch, on_read)
                _passed.add(stamp)
                if self._thread is not None:
                    _write_stamp(stamp)
            self._done = True
        except DataError as error:
            self._error = error


def _share() -> tuple[int, int]:
    """This process's rank and how many there are, as a launcher set them: a file system is asked for each byte once."""
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return 0, 1
    return (rank, size) if 0 <= rank < size else (0, 1)


def _stamp(folder: Path, checked: list[Stretch]) -> str:
    """A name that no other stretches have, nor the same ones after their files changed."""
    digest = xxhash.xxh3_128(os.path.realpath(folder).encode())
    for file in dict.fromkeys(stretch.file for stretch in checked):
        path = f"{folder}{os.sep}{file}"
        with user_errors(path):
            status = os.stat(path)
        digest.update(f"\n{file} {status.st_ino} {status.st_size} {status.st_mtime_ns}".encode())
    for stretch in checked:
        digest.update(f"\n{stretch.file} {stretch.start} {stretch.checksum}".encode())
    return digest.hexdigest()


def _stamps() -> Path:
    """Where stamps lie: never in the packed folder, which may be read-only."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "modalities" / "verified"


def _stamped(name: str) -> bool:
    """Whether it passed lately; where that cannot be known, it is checked again."""
    try:
        return time.time() - (_stamps() / name).stat().st_mtime < STAMP_DAYS * 86_400
    except (OSError, RuntimeError):  # none, or a user without a home
        return False


def _write_stamp(name: str) -> None:
    """Remember what passed, and forget what is too old; without a place for that the next start checks again."""
    with suppress(OSError, RuntimeError):
        folder = _stamps()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
        for entry in list(os.scandir(folder)):
            if time.time() - entry.stat().st_mtime > STAMP_DAYS * 86_400:
                os.unlink(entry.path)
