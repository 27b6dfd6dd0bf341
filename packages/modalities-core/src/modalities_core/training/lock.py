"""One job at a time in the folder of a run.

Rank 0 of a job holds an advisory lock of the operating system (``flock``) on ``.lock`` in the folder. The system takes
it away from a process that dies in whatever way, so a killed job blocks nobody. NFS passes such locks on to other
machines, but not every network file system does, and some know none. For those the holder also touches the file every
few seconds: where the file was last held from another machine and not given back, a new job first watches whether it
is still touched.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from modalities_core.errors import ConfigError, ResourceError
from modalities_core.interfaces import World
from modalities_core.training.collective import on_first

LOCK = ".lock"
TOUCH_SECONDS = 10.0
WATCH_SECONDS = 45.0
"""Longer than machines may remember what they have read of a file on another one."""

_held: dict[Path, Lock] = {}


@contextmanager
def locked(folder: Path, world: World) -> Iterator[None]:
    """Keep other jobs out of ``folder``, which is made if it is not there; nested calls are one; collective.

    Raises:
        ConfigError: another job is in there.
        ResourceError: the folder cannot be written.
    """
    taken = on_first(world, lambda: _take(folder))
    try:
        yield
    finally:
        lock = _held.pop(folder.resolve(), None) if taken else None
        if lock is not None:
            lock.release()


class Lock:
    """A lock that this process holds.

    Args:
        path: of the file.

    Raises:
        ConfigError: another job holds it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._over = threading.Event()
        try:
            locks = _try_lock(self._descriptor)
            if locks is False:
                raise _in_use(path)
            before = _read(path)
            if before and not (locks and before.get("machine") == _machine()):
                _refuse_if_touched(path)
            self._write({"machine": _machine(), "host": socket.gethostname(), "pid": os.getpid(), "since": time.time()})
        except BaseException:
            self.forget()
            raise
        threading.Thread(target=self._touch, name="lock of the run", daemon=True).start()

    def release(self) -> None:
        """Let the next job in."""
        self._over.set()
        with suppress(OSError):  # the folder may be gone
            self._write({})
        self.forget()

    def forget(self) -> None:
        """Close the file; in a forked process that leaves the lock with its parent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write(self, record: dict[str, Any]) -> None:
        assert self._descriptor is not None
        os.ftruncate(self._descriptor, 0)
        if record:
            os.pwrite(self._descriptor, json.dumps(record).encode(), 0)

    def _touch(self) -> None:
        while not self._over.wait(TOUCH_SECONDS):
            with suppress(OSError):
                os.utime(self._path)


def _take(folder: Path) -> bool:
    """Whether the lock was taken now, rather than by an outer call."""
    place = folder.resolve()
    if place in _held:
        return False
    try:
        place.mkdir(parents=True, exist_ok=True)
        _held[place] = Lock(place / LOCK)
    except OSError as error:
        raise ResourceError(f"cannot write into {folder}: {error}") from error
    return True


def _try_lock(descriptor: int) -> bool | None:
    """Whether this process has got the lock; None where the file system has no locks."""
    try:
        import fcntl
    except ImportError:
        return _try_lock_on_windows(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _try_lock_on_windows(descriptor: int) -> bool | None:
    import msvcrt

    beyond = 1 << 30  # a locked byte cannot be read
    os.lseek(descriptor, beyond, os.SEEK_SET)
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # pyrefly: ignore[missing-attribute]
    except OSError:
        return False
    return True


def _refuse_if_touched(path: Path) -> None:
    """Watch whether a job on another machine still touches the file."""
    message = "%s was not given back by its last job: watching for %d s whether that still runs elsewhere"
    logging.getLogger("modalities").warning(message, path, WATCH_SECONDS)
    end, first = time.monotonic() + WATCH_SECONDS, _touched(path)
    while time.monotonic() < end:
        time.sleep(min(1.0, WATCH_SECONDS / 10))
        if _touched(path) != first:
            raise _in_use(path)


def _touched(path: Path) -> int:
    # Opened, since network file systems ask again only then.
    with path.open("rb") as stream:
        return os.fstat(stream.fileno()).st_mtime_ns


def _in_use(path: Path) -> ConfigError:
    record = _read(path)
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["since"])) if "since" in record else ""
    who = f" (process {record['pid']} on {record['host']}, since {since})" if since else ""
    return ConfigError(
        f"another job is running in {path.parent}{who}",
        hint="give this one another folder, or start it again when that has ended: it then continues it",
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and {"pid", "host", "since"} <= record.keys() else {}


def _machine() -> str:
    """The same for all processes that one kernel has run since it was started."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _in_child() -> None:
    for lock in _held.values():
        lock.forget()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
