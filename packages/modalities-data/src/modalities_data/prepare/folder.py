"""The folder a job makes: worked on under a hidden name by one process, given its name when it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import msgspec

from modalities_core.errors import DataError
from modalities_core.files import sync_folder, write_json
from modalities_data import manifest as manifests

STATE_FOLDER = ".state"


def check_replaceable(output: Path, overwrite: bool) -> None:
    """Only a packed folder is ever replaced, and only when asked to.

    Raises:
        DataError: ``output`` exists and may not be replaced.
    """
    if not output.exists():
        return
    if not overwrite:
        raise DataError(f"{output} exists already", hint="choose another name, or pass --overwrite to replace it")
    if not (output / manifests.FILE_NAME).is_file():
        raise DataError(f"{output} is no packed folder, so --overwrite does not replace it")


def partial_folder(output: Path) -> Path:
    """Where ``output`` is made."""
    return output.with_name(f".{output.name}.partial")


@contextmanager
def working_folder(partial: Path, identity: dict[str, Any]) -> Iterator[None]:
    """Hold ``partial`` for this process alone, with what an earlier run of the same job left, or empty.

    Args:
        partial: the folder.
        identity: JSON values that are equal only for the same job.

    Raises:
        DataError: another process holds it.
    """
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / ".lock").open("a") as lock:
        _lock(lock, partial)
        job_file = partial / STATE_FOLDER / "job.json"
        if not (job_file.is_file() and _read(job_file) == identity):
            for entry in partial.iterdir():
                if entry.name != ".lock":
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            job_file.parent.mkdir()
            write_json(job_file, identity)
        yield


def give_name(partial: Path, output: Path, overwrite: bool) -> None:
    """Rename the complete ``partial`` to ``output``; what is replaced is deleted afterwards."""
    sync_folder(partial)
    check_replaceable(output, overwrite)
    replaced = output.with_name(f".{output.name}.{os.getpid()}.replaced")
    if output.exists():
        output.rename(replaced)
    partial.rename(output)
    sync_folder(output.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _read(path: Path) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes())
    except msgspec.DecodeError:
        return None


def _lock(stream: TextIO, partial: Path) -> None:
    """Refuse to work where another process does; the lock goes with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"another process is packing into {partial}", hint="wait for it, or end it first") from None
