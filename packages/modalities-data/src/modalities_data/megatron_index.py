r"""The ``.idx`` layout of Megatron-LM: where each document of a ``.bin`` file lies.

Little-endian throughout: magic ``MMIDIDX\0\0``, u64 version 1, u8 dtype code, u64 count of sequences, u64 count of
document entries, then i32 lengths in tokens, i64 positions in bytes, and i64 document entries (the number of the first
sequence of each document, and one more that closes the last). We write one sequence per document.
Source: https://github.com/NVIDIA/Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from modalities_core.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
CODE_OF_DTYPE = {"uint16": 8, "int32": 4}
LONGEST_DOCUMENT = 2**31 - 1
UINT16_VOCABULARY = 65_500
"""Below this vocabulary size Megatron-LM stores and expects uint16, from it on int32."""


@dataclass(frozen=True, slots=True)
class Index:
    """The documents of one ``.bin`` file.

    dtype: of the tokens.
    lengths: (sequences,) int32, in tokens.
    pointers: (sequences,) int64, in bytes.
    entries: (documents + 1,) int64, the first sequence of each document.
    modes: (sequences,) int8 of a multimodal file, 0 for text; None elsewhere.
    """

    dtype: np.dtype
    lengths: np.ndarray
    pointers: np.ndarray
    entries: np.ndarray
    modes: np.ndarray | None = None


def token_dtype(vocab_size: int) -> str:
    """``uint16`` or ``int32``, by Megatron-LM's rule."""
    return "uint16" if vocab_size < UINT16_VOCABULARY else "int32"


def write_index(stream: BinaryIO, dtype: str, lengths: np.ndarray) -> None:
    """Write the index of documents that lie back to back.

    Args:
        stream: where to.
        dtype: ``uint16`` or ``int32``.
        lengths: (documents,) tokens of each, at most 2**31 - 1.
    """
    count = len(lengths)
    pointers = np.zeros(count, "<i8")
    np.cumsum(lengths[:-1], out=pointers[1:])
    pointers *= np.dtype(dtype).itemsize
    stream.write(HEADER.pack(MAGIC, 1, CODE_OF_DTYPE[dtype], count, count + 1))
    stream.write(lengths.astype("<i4").data)
    stream.write(pointers.data)
    stream.write(np.arange(count + 1, dtype="<i8").data)


def index_bytes(documents: int) -> int:
    """The size of an index that ``write_index`` writes."""
    return HEADER.size + 20 * documents + 8


def read_index(path: Path, content: bytes | memoryview, bin_bytes: int) -> Index:
    """Read an index of ours or of Megatron-LM's.

    Args:
        path: for messages.
        content: the whole file.
        bin_bytes: the size of the ``.bin`` file.

    Raises:
        DataError: it is no such file, is cut off, or does not fit the ``.bin`` file.
    """
    if len(content) < HEADER.size:
        raise DataError(f"{path}: an index has at least {HEADER.size} bytes, this file has {len(content)}")
    magic, version, code, sequences, entries = HEADER.unpack_from(content)
    if magic != MAGIC or version != 1 or code not in DTYPE_CODES:
        raise DataError(
            f"{path}: expected a Megatron index (MMIDIDX version 1), found magic {magic!r}, version {version}, "
            f"dtype code {code}"
        )
    expected = HEADER.size + 12 * sequences + 8 * entries
    # Multimodal Megatron files carry one more byte per sequence.
    if len(content) not in (expected, expected + sequences):
        raise DataError(f"{path}: its header promises {expected} bytes, the file has {len(content)}")
    dtype = np.dtype(DTYPE_CODES[code])
    lengths = np.frombuffer(content, "<i4", sequences, HEADER.size)
    pointers = np.frombuffer(content, "<i8", sequences, HEADER.size + 4 * sequences)
    document_entries = np.frombuffer(content, "<i8", entries, HEADER.size + 12 * sequences)
    modes = np.frombuffer(content, "i1", sequences, expected) if len(content) > expected else None
    index = Index(dtype, lengths, pointers, document_entries, modes)
    end = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize if sequences else 0
    if end != bin_bytes:
        raise DataError(f"{path}: its last document ends at byte {end}, but the .bin file has {bin_bytes} bytes")
    return index
