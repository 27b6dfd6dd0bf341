"""One column of text from Parquet files, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import xxhash

from modalities_core.errors import ConfigError, DataError, ModalitiesError
from modalities_data.inputs.streams import Metered, open_input
from modalities_data.jsonl import BLOCK_BYTES, Block, Failure

MOST_ROWS = 4096


class RowGroup(NamedTuple):
    """What the footer tells about the column of text in one row group: where it lies, and its rows."""

    offset: int
    bytes: int
    uncompressed_bytes: int
    rows: int


def row_groups(name: str, key: str) -> list[RowGroup]:
    """The column ``key`` of every row group.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: this is no Parquet file, or has no such column of text.
    """
    with _opened(name) as (_, file):
        column = _column(name, file, key)
        return [_row_group(file, number, column) for number in range(file.metadata.num_row_groups)]


def rows(name: str, key: str, first: int, end: int, digest: xxhash.xxh3_64) -> Iterator[Block]:
    """The column ``key`` of row groups ``first`` to ``end``, some megabytes at a time.

    Args:
        name: path or address.
        key: the column.
        first: the first row group.
        end: one more than the last.
        digest: takes the column's stored bytes.

    Raises:
        DataError: the file is damaged.
    """
    with _opened(name) as (stream, file):
        column = _column(name, file, key)
        done = 0
        for number in range(first, end):
            group = _row_group(file, number, column)
            _checksum(stream, name, group, digest)
            size = max(1, min(MOST_ROWS, BLOCK_BYTES * group.rows // max(1, group.uncompressed_bytes)))
            left = group.bytes
            for batch in file.iter_batches(size, [number], [key], use_threads=False):
                share = min(left, -(-group.bytes * len(batch) // max(1, group.rows)))
                left -= share
                yield _block(batch.column(0), done, share)
                done += len(batch)


def rows_before(name: str, end: int) -> int:
    """Rows in the row groups before ``end``."""
    with _opened(name) as (_, file):
        return sum(file.metadata.row_group(number).num_rows for number in range(end))


@contextmanager
def _opened(name: str) -> Iterator[tuple[Any, Any]]:
    """The stream and pyarrow's reader on it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"reading {name} needs pyarrow", hint='pip install "modalities-data[parquet]"') from None
    stream: Any = open_input(name)
    with stream:
        try:
            # With a buffer, pages are read as they are needed: memory does not grow with the row group.
            yield stream, pyarrow.parquet.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
        except (ModalitiesError, GeneratorExit):
            raise
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise DataError(f"{name} is damaged or no Parquet file: {error}") from error


def _column(name: str, file: Any, key: str) -> int:
    """The number of the column, which has to hold text."""
    import pyarrow

    schema = file.schema_arrow
    if key not in schema.names:
        raise DataError(f"{name} has no column {key!r}", hint=f"it has: {', '.join(schema.names)}; choose with --key")
    kind = schema.field(key).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    types = pyarrow.types
    # A file without rows often has a column of nulls.
    if not any(holds(kind) for holds in (types.is_string, types.is_large_string, types.is_string_view, types.is_null)):
        raise DataError(f"{name}: the column {key!r} holds {kind}, not text")
    return next(n for n in range(file.metadata.num_columns) if file.schema.column(n).path == key)


def _row_group(file: Any, number: int, column: int) -> RowGroup:
    group = file.metadata.row_group(number)
    chunk = group.column(column)
    starts = [chunk.data_page_offset, *([chunk.dictionary_page_offset] if chunk.has_dictionary_page else [])]
    return RowGroup(min(starts), chunk.total_compressed_size, chunk.total_uncompressed_size, group.num_rows)


def _checksum(stream: Any, name: str, group: RowGroup, digest: xxhash.xxh3_64) -> None:
    metered = Metered(stream, name, digest)
    stream.seek(group.offset)
    while metered.bytes < group.bytes and metered.read(min(1 << 20, group.bytes - metered.bytes)):
        pass


def _block(column: Any, first: int, size: int) -> Block:
    block = Block(0, size, first=first, records=len(column))
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = [_text(value) for value in column]
    for number, value in enumerate(values):
        if isinstance(value, str):
            block.texts.append(value)
            continue
        block.gaps.append(number)
        reason = "there is no text (null)" if value is None else f"the text is not UTF-8 ({value.reason})"
        block.failures.append(Failure(first + number, reason, number))
    return block


def _text(value: Any) -> str | UnicodeDecodeError | None:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return error
