"""Worker processes for packing: started fresh, ended with their parent, and quick to stop."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import wait as wait_for
from typing import Any

from modalities_core.errors import ModalitiesError, ResourceError
from modalities_core.freed_memory import keep_freed
from modalities_data.inputs.units import Unit
from modalities_data.prepare.shards import Job, Report, UnitResult, pack_unit

SECONDS_BETWEEN_REPORTS = 0.2
# Parallelism is in the processes: threads of the tokenizers beneath them would only fight for the same cores.
ONE_THREAD = {"RAYON_NUM_THREADS": "1"}

KEPT_MEMORY = 64 << 20
"""Bytes: asking the system again for what was just given back costs the tokenizers library 2 to 4 %."""

_worker: dict[str, Any] = {}


class _Stopped(Exception):
    """This worker was told to stop because another one failed."""


def pack_in_processes(job: Job, units: dict[int, Unit], workers: int, report: Report) -> dict[int, UnitResult]:
    """Pack ``units`` in ``workers`` processes.

    Raises:
        ModalitiesError: what a worker raised, of several the one of the first unit, as a single process would; later
            units stop within a block.
        ResourceError: a worker was killed.
    """
    context = multiprocessing.get_context("spawn")
    # Without locks: a worker that is killed while it holds one would have all others wait for ever. Each unit counts in
    # two places of its own, bytes read and tokens written.
    counts, stop = context.RawArray("q", 2 * len(units)), context.RawValue("b", 0)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (job, counts, stop))
    reported = (0, 0)
    waiting = enumerate(units.items())
    pending: dict[Future[UnitResult], int] = {}
    results: dict[int, UnitResult] = {}
    errors: dict[int, ModalitiesError] = {}
    try:
        while True:
            # A few at a time: waiting on all the units of a large corpus would cost more with each of them.
            with _inherited(ONE_THREAD):
                for place, (number, unit) in islice(waiting, 0 if errors else 2 * workers - len(pending)):
                    pending[pool.submit(_pack_unit, place, number, unit)] = number
            if errors and min(pending.values(), default=min(errors)) >= min(errors):
                raise errors[min(errors)]
            if not pending:
                return results
            finished, _ = wait(pending, SECONDS_BETWEEN_REPORTS, FIRST_COMPLETED)
            now = (sum(counts[0::2]), sum(counts[1::2]))
            report(now[0] - reported[0], now[1] - reported[1])
            reported = now
            for future in finished:
                number = pending.pop(future)
                try:
                    results[number] = future.result()
                except ModalitiesError as error:
                    errors[number] = error
    except BrokenProcessPool as error:
        raise ResourceError(
            "a packing worker was killed, as happens when memory runs out",
            hint="run the same command again, with fewer --workers if memory was short: finished shards are kept",
        ) from error
    finally:
        stop.value = 1
        pool.shutdown(cancel_futures=True)


def _start_worker(job: Job, counts: Any, stop: Any) -> None:
    """Prepare a new process: the parent alone answers Ctrl-C, and no worker outlives it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed(KEPT_MEMORY)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker.update(job=job, counts=counts, stop=stop)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


def _pack_unit(place: int, number: int, unit: Unit) -> UnitResult:
    counts = _worker["counts"]

    def report(new_bytes: int, new_tokens: int) -> None:
        counts[2 * place] += new_bytes
        counts[2 * place + 1] += new_tokens
        if _worker["stop"].value:
            raise _Stopped

    return pack_unit(_worker["job"], number, unit, report)


@contextmanager
def _inherited(variables: dict[str, str]) -> Iterator[None]:
    """Set ``variables`` and hold Ctrl-C back while processes start, which inherit both."""
    has_mask = hasattr(signal, "pthread_sigmask")  # not on Windows
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if has_mask else set()
    try:
        with environment(variables):
            yield
    finally:
        if has_mask:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set ``variables`` of this process during the body."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
