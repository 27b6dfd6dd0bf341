"""The pickled document index of the original Modalities, read without unpickling.

It is a list of pairs of integers, (offset, length), in bytes. Unpickling calls whatever a file names; this reader
knows the opcodes of lists, tuples and integers, takes numbers out of them, and refuses every other. What opcodes mean
is documented in the standard library: https://docs.python.org/3/library/pickletools.html, PEP 307 and PEP 3154.
"""

from __future__ import annotations

from array import array

import numpy as np

from modalities_core.errors import DataError

MARK, STOP, EMPTY_LIST, APPEND, APPENDS, TUPLE2 = b"(.]ae\x86"
BININT1, BININT2, BININT, LONG1 = b"KMJ\x8a"
PROTO, FRAME, MEMOIZE, BINPUT, LONG_BINPUT = b"\x80\x95\x94qr"
SKIPPED = {FRAME: 9, MEMOIZE: 1, BINPUT: 2, LONG_BINPUT: 5}
"""Opcodes without a meaning here, and their sizes: the remembered objects are never asked for."""
INTEGERS = {BININT1: (2, False), BININT2: (3, False), BININT: (5, True)}
LARGEST = 2**63 - 1


def read_pairs(content: bytes | memoryview, name: str) -> np.ndarray:
    """The pairs of a pickled ``list[tuple[int, int]]``, of protocol 2 to 5.

    Args:
        content: the whole pickle.
        name: of the file, for messages.

    Returns:
        (pairs, 2) int64.

    Raises:
        DataError: it is cut off, or holds anything but pairs of integers from 0 to 2**63 - 1 in one list.
    """
    data = bytes(content)
    try:
        values = _scan(data, name)
    except IndexError:
        raise DataError(f"{name}: the document index is cut off after {len(data)} bytes") from None
    return np.frombuffer(values, np.int64).reshape(-1, 2)


def _scan(data: bytes, name: str) -> array:
    """The integers of all pairs; raises IndexError where the pickle is cut off."""
    if len(data) < 2 or data[0] != PROTO or not 2 <= data[1] <= 5:
        raise DataError(f"{name}: there is no document index; expected a pickle of protocol 2 to 5")
    values = array("q")
    position = 2
    # Where in the grammar: before the list, in it, or between a mark and the pairs' being appended.
    opened = marked = False
    waiting = 0  # integers since the last pair
    loose = 0  # pairs not yet appended
    while True:
        code = data[position]
        if code in INTEGERS:
            size, signed = INTEGERS[code]
            if position + size > len(data):
                raise IndexError
            values.append(int.from_bytes(data[position + 1 : position + size], "little", signed=signed))
            waiting += 1
            position += size
        elif code in SKIPPED:
            position += SKIPPED[code]
        elif code == TUPLE2 and opened and waiting == 2:
            waiting, loose = 0, loose + 1
            position += 1
        elif code == LONG1:
            size = data[position + 1]
            number = int.from_bytes(data[position + 2 : position + 2 + size], "little", signed=True)
            if position + 2 + size > len(data):
                raise IndexError
            if not 0 <= number <= LARGEST:
                raise DataError(f"{name}: a number at byte {position} of the document index is out of range")
            values.append(number)
            waiting += 1
            position += 2 + size
        elif code == EMPTY_LIST and not opened:
            opened = True
            position += 1
        elif code == MARK and opened and not (marked or waiting or loose):
            marked = True
            position += 1
        elif (code == APPENDS and marked and not waiting) or (
            code == APPEND and not marked and loose == 1 and not waiting
        ):
            marked, loose = False, 0
            position += 1
        elif code == STOP and opened and not (marked or waiting or loose):
            break
        else:
            raise DataError(
                f"{name}: opcode {bytes([code])!r} at byte {position} of the document index is not part of a list of "
                "pairs of integers",
                hint="the index of the original Modalities has nothing else; do not open this file with pickle",
            )
    if position + 1 != len(data):
        raise DataError(f"{name}: {len(data) - position - 1} bytes follow the document index")
    if values and min(values) < 0:
        raise DataError(f"{name}: the document index has negative numbers")
    return values
