"""Which files a user means: files, folders, patterns and addresses, in an order that never changes."""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple, get_args

from modalities_core.errors import ConfigError, DataError
from modalities_data.disk import user_errors
from modalities_data.inputs.remote import Listing, is_address, list_remote

Format = Literal["jsonl", "parquet", "text"]
FormatChoice = Literal["auto", "jsonl", "parquet", "text"]
Sources = str | Path | Sequence[str | Path]
"""One file, folder, pattern or address, or several."""

FORMATS: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "text"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

log = logging.getLogger(__name__)


class InputFile(NamedTuple):
    """A file to read.

    name: path or address.
    format: of what is in it.
    compression: ``gzip``, ``zstd`` or empty.
    bytes: its size.
    version: changes when the file does: the time it was modified, or what its server calls its version.
    """

    name: str
    format: Format
    compression: str
    bytes: int
    version: str


def find_inputs(sources: Sources, format: FormatChoice = "auto") -> list[InputFile]:
    """The files of ``sources``: those of a folder (at any depth) and of a pattern sorted by name.

    In a folder only files with a known ending count, unless ``format`` says what all of them are; names that begin
    with a dot or an underscore never do. A file that is named itself is JSON Lines if its ending says nothing else.

    Args:
        sources: paths, folders, patterns (``*``, ``**``, ``?``, ``[]``) or addresses.
        format: what is in the files; ``auto`` goes by their endings.

    Raises:
        ConfigError: the format is unknown.
        DataError: nothing is there, or a folder or pattern has no such file.
    """
    if format not in get_args(FormatChoice):
        raise ConfigError(f"format is one of {', '.join(get_args(FormatChoice))}, not {format!r}")
    named = [sources] if isinstance(sources, str | Path) else list(sources)
    if not named:
        raise ConfigError("there is no input")
    found = [file for source in named for file in _expand(str(source), format)]
    times = Counter(file.name for file in found)
    if twice := [name for name, count in times.items() if count > 1]:
        log.warning("%s is given more than once, and read as often", twice[0])
    return found


def _expand(source: str, format: FormatChoice) -> list[InputFile]:
    """The files of one source."""
    with user_errors(source):
        kind, name, entries = list_remote(source) if is_address(source) else _list_local(source)
    if kind == "file":
        return [_input(*entries[0], format)]
    # What a pattern matches was asked for by name.
    visible = sorted(entry for entry in entries if kind == "pattern" or not _hidden(entry[0].removeprefix(name)))
    matches = [entry for entry in visible if format != "auto" or _format(entry[0])[0] is not None]
    if not matches:
        raise DataError(
            f"{source} has no input files ({len(visible)} others)" if visible else f"{source}: there is no such file",
            hint=f"endings that are read: {', '.join(FORMATS)}, text also with .gz or .zst behind; or say --format",
        )
    if len(matches) < len(visible):
        others = [entry[0] for entry in visible if entry not in set(matches)]
        log.warning("%s: %d files of other kinds are not read, such as %s", source, len(others), others[0])
    return [_input(*entry, format) for entry in matches]


def _list_local(source: str) -> Listing:
    path = Path(source)
    if path.is_dir():
        kind, names = "folder", [os.path.join(root, name) for root, _, files in os.walk(source) for name in files]
    elif not path.exists() and glob.has_magic(source):
        kind, names = "pattern", [name for name in glob.glob(source, recursive=True) if not os.path.isdir(name)]
    else:
        kind, names = "file", [source]
    statuses = [(name, os.stat(name)) for name in names]
    entries = [(name, status.st_size, str(status.st_mtime_ns)) for name, status in statuses]
    return Listing(kind, source, entries)  # type: ignore[arg-type]


def _hidden(name: str) -> bool:
    return any(part[:1] in "._" and part not in (".", "..") for part in PurePosixPath(name).parts)


def _format(name: str) -> tuple[Format | None, str]:
    """What the ending tells: format and compression."""
    path = PurePosixPath(name.lower().split("?")[0] if is_address(name) else Path(name).name.lower())
    compression = COMPRESSIONS.get(path.suffix, "")
    return FORMATS.get(PurePosixPath(path.stem).suffix if compression else path.suffix), compression


def _input(name: str, size: int, version: str, format: FormatChoice) -> InputFile:
    known, compression = _format(name)
    chosen = format if format != "auto" else known or "jsonl"
    if chosen == "parquet" and compression:
        raise ConfigError(f"{name}: Parquet files are compressed inside, not as a whole", hint="decompress it first")
    return InputFile(name, chosen, compression, size, version)
