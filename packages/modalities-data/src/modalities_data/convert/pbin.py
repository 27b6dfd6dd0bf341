"""From ``.pbin`` files of the original Modalities.

u64 bytes of tokens, u32 bytes per token (1, 2 or 4), the tokens, unsigned and little-endian, and to the end of the file
a pickled list of (offset, length) in bytes from the first token. Nothing is unpickled: see ``legacy_index``.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from modalities_core.errors import ConfigError, DataError
from modalities_data.convert.legacy_index import read_pairs
from modalities_data.convert.raw import RawTokens, Vocabulary
from modalities_data.convert.shards import write_converted
from modalities_data.disk import user_errors
from modalities_data.manifest import Manifest
from modalities_data.prepare.rewrite import OnProgress

HEADER = struct.Struct("<QI")
DTYPES = {1: "<u1", 2: "<u2", 4: "<u4"}

log = logging.getLogger(__name__)


def from_pbin(
    files: Sequence[Path],
    output: Path,
    vocabulary: Vocabulary,
    *,
    append_end: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress = lambda done, total, tokens: None,
) -> Manifest:
    """Make a packed folder of ``.pbin`` files, one shard each.

    Files that the original merged have a document index whose offsets are wrong from the second part on; the lengths
    in it are right, so documents are cut by them, with a warning.

    Args:
        files: in their order.
        output: the folder to make.
        vocabulary: what the ids mean.
        append_end: put the end-of-document id where a document lacks it.
        overwrite: replace an existing packed folder.
        on_progress: told about progress.

    Raises:
        ConfigError: there is no file.
        DataError: a file is damaged or was never finished, or an id is not in the vocabulary.
    """
    if not files:
        raise ConfigError("there is no file to convert")
    sources = [_read(Path(file)) for file in files]
    return write_converted(
        sources, output, vocabulary, options={"command": "convert from-pbin"}, inputs=[Path(file) for file in files],
        append_end=append_end, overwrite=overwrite, on_progress=on_progress,
    )  # fmt: skip


def _read(path: Path) -> RawTokens:
    """Header and index of a file."""
    with user_errors(path), path.open("rb") as stream:
        size = path.stat().st_size
        head = stream.read(HEADER.size)
        if len(head) < HEADER.size:
            raise DataError(f"{path}: a .pbin file has at least {HEADER.size} bytes, this file has {size}")
        data_bytes, itemsize = HEADER.unpack(head)
        if not data_bytes:
            raise DataError(f"{path} was never finished: its header says 0 bytes of tokens", hint="pack it again")
        if itemsize not in DTYPES or data_bytes % itemsize or HEADER.size + data_bytes > size:
            raise DataError(
                f"{path} is no .pbin file: its header says {data_bytes} bytes of tokens of {itemsize} bytes, "
                f"the file has {size} bytes"
            )
        stream.seek(HEADER.size + data_bytes)
        pairs = read_pairs(stream.read(), str(path))
    offsets, lengths = pairs[:, 0], pairs[:, 1]
    ends = np.cumsum(lengths)
    if not len(pairs) or int(ends[-1]) != data_bytes or np.any(lengths % itemsize) or np.any(ends < lengths):
        raise DataError(f"{path}: its {len(pairs)} documents do not add up to {data_bytes} bytes of tokens")
    if not np.array_equal(offsets, ends - lengths):
        wrong = int(np.count_nonzero(offsets != ends - lengths))
        log.warning("%s: the offsets of %d documents are wrong, as in merged files; cut by their lengths", path, wrong)
    tokens = data_bytes // itemsize
    return RawTokens(path, HEADER.size, np.dtype(DTYPES[itemsize]), tokens, (ends - lengths) // itemsize,
                     lengths // itemsize)  # fmt: skip
