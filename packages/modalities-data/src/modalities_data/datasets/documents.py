"""Parts of a packed folder that begin and end with whole documents."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import numpy as np

from modalities_core.errors import ConfigError
from modalities_data.packed import PackedFolder


class DocumentRange(NamedTuple):
    """Consecutive documents of a folder, and the tokens they are.

    first_document, behind_document: numbers in the folder, the second behind the last.
    first_token, behind_token: places among all tokens of the folder.
    """

    first_document: int
    behind_document: int
    first_token: int
    behind_token: int


def documents_between(packed: PackedFolder, start: float, end: float, owner: object) -> DocumentRange:
    """The documents that begin between two fractions of a folder's tokens.

    Ranges that meet at the same fraction share no document, and together they are the whole. Reads at most two indices.

    Args:
        packed: the folder.
        start: from 0.0 on.
        end: up to 1.0.
        owner: whose arguments ``start`` and ``end`` are.

    Raises:
        ConfigError: the fractions are out of order or range, or no document begins between them.
        DataError: an index is damaged.
    """
    if not 0 <= start < end <= 1:
        raise ConfigError(f"a part is 0 <= start < end <= 1, not {start} to {end}", about=(owner, "start"))
    (first_document, first_token), (behind_document, behind_token) = (_cut(packed, part) for part in (start, end))
    if first_document == behind_document:
        raise ConfigError(
            f"none of {packed.manifest.documents} documents begins between the fractions {start} and {end}",
            about=(owner, "end"),
        )
    return DocumentRange(first_document, behind_document, first_token, behind_token)


def _cut(packed: PackedFolder, fraction: float) -> tuple[int, int]:
    """The first document that begins at or behind ``fraction`` of all tokens, and its first token."""
    shards = packed.manifest.shards
    token = round(fraction * packed.manifest.tokens)
    ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64)
    number = int(np.searchsorted(ends, token, side="right"))
    documents, before = (sum(getattr(shard, name) for shard in shards[:number]) for name in ("documents", "tokens"))
    if token == before:  # also at the end of all, where there is no shard
        return documents, before
    pointers, size = packed.kept_index(number).pointers, packed.dtype.itemsize
    inside = bisect_left(pointers, (token - before) * size)
    if inside == len(pointers):
        return documents + shards[number].documents, before + shards[number].tokens
    return documents + inside, before + int(pointers[inside]) // size
