"""Encoding some documents a second time, beside the work, with the library that defines what is right."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from modalities_core.errors import ConfigError, DataError
from modalities_core.interfaces import Tokenizer
from modalities_data.inputs.reading import record_place
from modalities_data.inputs.units import Piece
from modalities_data.tokenizers.engines import Engine

WAITING_DOCUMENTS = 16
"""How many may wait; then packing waits for the slower engine."""


class _Document(NamedTuple):
    """A document, its ids, and where it came from."""

    piece: Piece
    record: int
    text: str
    ids: np.ndarray


class Recheck:
    """Compares every ``every``-th document of a unit on a thread of its own."""

    def __init__(self, reference: Engine, every: int, name: str) -> None:
        """Check against ``reference`` what the engine ``name`` gave; started by ``rechecking``."""
        self.every = every
        self.documents = 0
        self._reference, self._name = reference, name
        self._queue: queue.Queue[_Document | None] = queue.Queue(WAITING_DOCUMENTS)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def chosen(self, count: int) -> range:
        """Which of the next ``count`` documents are checked; counts them."""
        first = -self.documents % self.every
        self.documents += count
        return range(first, count, self.every)

    def add(self, piece: Piece, record: int, text: str, ids: np.ndarray) -> None:
        """Have a document checked.

        Args:
            piece: where it lies.
            record: its number there.
            text: the document.
            ids: (tokens,) what the engine gave.

        Raises:
            DataError: an earlier one was different.
        """
        if self._error is not None:
            raise self._error
        self._queue.put(_Document(piece, record, text, ids.copy()))

    def _run(self) -> None:
        while (document := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._check(document)
                except BaseException as error:  # told to the thread that packs
                    self._error = error

    def _check(self, document: _Document) -> None:
        expected, _ = self._reference.encode_flat([document.text])
        if np.array_equal(document.ids, expected):
            return
        shared = min(len(expected), len(document.ids))
        place = int(np.argmin([*(document.ids[:shared] == expected[:shared]), False]))
        raise DataError(
            f"{record_place(document.piece, document.record)}: {self._name} gives "
            f"{document.ids[place : place + 4].tolist()} at token {place}, tokenizers gives "
            f"{expected[place : place + 4].tolist()}",
            hint="pack with --engine tokenizers, and please report the document",
        )


@contextmanager
def rechecking(tokenizer: Tokenizer, every: int | None) -> Iterator[Recheck | None]:
    """Check documents during the body, all of them by its end; None where ``every`` is.

    Raises:
        DataError: a document has other ids.
    """
    if every is None:
        yield None
        return
    check = Recheck(reference_engine(tokenizer), every, getattr(tokenizer, "engine", "the engine"))
    check._thread.start()
    finished = False
    try:
        yield check
        finished = True
    finally:
        if not finished:
            check._error = check._error or InterruptedError()  # what waits need not be checked any more
        check._queue.put(None)
        check._thread.join()
    if check._error is not None:
        raise check._error


def reference_engine(tokenizer: Tokenizer) -> Engine:
    """What defines the right ids of ``tokenizer``.

    Raises:
        ConfigError: nothing does but the tokenizer itself.
    """
    reference = getattr(tokenizer, "reference", None)
    if reference is None:
        raise ConfigError(
            f"--verify-every compares with the tokenizers library, which does not know {type(tokenizer).__name__}",
            hint="it works with a tokenizer.json",
        )
    return reference()
