"""Lines of JSONL inputs as they are, and the record beside a JSONL file that was made of others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import xxhash

from modalities_core.errors import ConfigError
from modalities_core.files import checksum, write_json
from modalities_data.disk import user_errors
from modalities_data.inputs.files import InputFile
from modalities_data.inputs.streams import Metered, decompressed, open_input
from modalities_data.jsonl import BYTE_ORDER_MARK
from modalities_data.manifest import Accounting, Input

FORMAT = "modalities-lines"
CHUNK_BYTES = 1 << 20


class LinesRecord(msgspec.Struct, frozen=True):
    """What is beside a JSONL file that was made of others: ``NAME.manifest.json``, written last."""

    bytes: int
    checksum: str
    accounting: Accounting
    inputs: list[Input]
    producer: str
    options: dict[str, Any]
    format: str = FORMAT
    version: int = 1


class Lines(NamedTuple):
    """Some lines of one file.

    lines: not blank, without their ends and without a byte order mark.
    blank: how many blank lines lay among them.
    bytes: what was read for them, as it is stored.
    """

    lines: list[bytes]
    blank: int
    bytes: int


def lines_of(file: InputFile, digest: xxhash.xxh3_64 | None = None) -> Iterator[Lines]:
    """The lines of a file, plain or compressed, a megabyte at a time or one longer line.

    Args:
        file: of JSON Lines.
        digest: takes every stored byte.
    """
    with user_errors(file.name), open_input(file.name) as raw:
        stream = Metered(raw, file.name, xxhash.xxh3_64() if digest is None else digest)
        content = decompressed(stream, file.name, file.compression)
        pieces: list[bytes] = []
        first, read = True, 0
        while True:
            chunk = content.read(CHUNK_BYTES)
            cut = chunk.rfind(b"\n") + 1
            if chunk and not cut:
                pieces.append(chunk)
                continue
            data = b"".join([*pieces, chunk[:cut]])
            if first:
                data, first = data.removeprefix(BYTE_ORDER_MARK), False
            yield _split(data, stream.bytes - read)
            read, pieces = stream.bytes, [chunk[cut:]]
            if not chunk:
                return


def _split(data: bytes, size: int) -> Lines:
    lines = data.removesuffix(b"\n").split(b"\n") if data else []
    kept = [line.removesuffix(b"\r") for line in lines if line and not line.isspace()]
    return Lines(kept, len(lines) - len(kept), size)


def only_lines(files: Sequence[InputFile], output: Path) -> None:
    """Refuse inputs whose lines are no documents, and an output that is one of them.

    Raises:
        ConfigError: a file is Parquet or text, or is the output.
    """
    for file in files:
        if file.format != "jsonl":
            raise ConfigError(f"{file.name} is {file.format}; this works on lines of JSON", hint="pack it first")
        refuse_same(file, output)


def refuse_same(file: InputFile, output: Path) -> None:
    """Refuse an output that is an input.

    Raises:
        ConfigError: it is.
    """
    if Path(file.name).resolve() == output.resolve():
        raise ConfigError(f"{output} is an input too; name another output")


def write_record(output: Path, inputs: list[Input], options: dict[str, Any], accounting: Accounting) -> LinesRecord:
    """Write the record of the JSONL file ``output`` beside it."""
    producer = f"modalities-data {version('modalities-data')}"
    record = LinesRecord(output.stat().st_size, checksum(output), accounting, inputs, producer, options)
    write_json(output.with_name(f"{output.name}.manifest.json"), msgspec.to_builtins(record))
    return record
