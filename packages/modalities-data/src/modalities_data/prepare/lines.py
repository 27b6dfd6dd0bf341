"""Lines of a JSONL file as they are, and the record beside a JSONL file that was made of another."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from modalities_core.files import checksum, write_json
from modalities_data.jsonl import BYTE_ORDER_MARK
from modalities_data.manifest import Accounting, Input

FORMAT = "modalities-lines"


class LinesRecord(msgspec.Struct, frozen=True):
    """What is beside a JSONL file that was made of another: ``NAME.manifest.json``, written last."""

    bytes: int
    checksum: str
    accounting: Accounting
    inputs: list[Input]
    producer: str
    options: dict[str, Any]
    format: str = FORMAT
    version: int = 1


def lines_of(path: Path) -> Iterator[bytes]:
    """Every line of a file that is not blank, without its end and without a byte order mark."""
    with path.open("rb", buffering=1 << 20) as stream:
        for number, line in enumerate(stream):
            content = line.removesuffix(b"\n").removesuffix(b"\r")
            if number == 0:
                content = content.removeprefix(BYTE_ORDER_MARK)
            if content and not content.isspace():
                yield content


def count_lines(path: Path) -> tuple[int, int]:
    """How many lines are not blank, and how many are."""
    lines = sum(1 for _ in lines_of(path))
    with path.open("rb", buffering=1 << 20) as stream:
        return lines, sum(1 for _ in stream) - lines


def write_record(output: Path, source: Path, options: dict[str, Any], accounting: Accounting) -> LinesRecord:
    """Write the record of the JSONL file ``output`` beside it."""
    record = LinesRecord(
        output.stat().st_size, checksum(output), accounting,
        [Input(str(source), source.stat().st_size, checksum(source))],
        f"modalities-data {version('modalities-data')}", options,
    )  # fmt: skip
    write_json(output.with_name(f"{output.name}.manifest.json"), msgspec.to_builtins(record))
    return record
