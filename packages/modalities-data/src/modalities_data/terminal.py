"""What the commands print: progress on a terminal, plain lines elsewhere, one JSON line for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from modalities_data.manifest import Accounting


def say(text: str, as_json: bool) -> None:
    """Print for a human; where stdout belongs to a program, on stderr."""
    click.echo(text, err=as_json)


def summarize(summary: dict[str, Any], as_json: bool) -> None:
    """Print ``summary`` as the last line of stdout where a program asked for it."""
    if as_json:
        click.echo(json.dumps(summary, ensure_ascii=False))


def amount(value: float, unit: str = "") -> str:
    """``value`` with a metric prefix: 31.5 M."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.1f} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def accounted(counts: Accounting, unit: str, rejected: str = "") -> str:
    """Where every document went: 98 of 100 documents, 1 skipped as empty, 1 failed (see NAME).

    Args:
        counts: in = written + skipped + failed.
        unit: what a document is called.
        rejected: where those that failed are listed.
    """
    skipped = "".join(f", {count} skipped as {rule}" for rule, count in counts.skipped.items())
    failed = f", {counts.failed} failed" + (f" (see {rejected})" if rejected else "") if counts.failed else ""
    return f"{counts.written} of {counts.documents} {unit}{skipped}{failed}"


def rates(seconds: float, read: int, tokens: int) -> str:
    """How long it took, and what that is in bytes and tokens a second."""
    return f"{seconds:.1f} s, {amount(read / seconds, 'B/s')}, {amount(tokens / seconds, 'tokens/s')}"


@contextmanager
def packing_progress(label: str = "packing", unit: str = "tokens") -> Iterator[Callable[[int, int, int], None]]:
    """A bar with rates on a terminal, nothing elsewhere.

    Args:
        label: what is being done.
        unit: what is counted beside bytes.

    Yields:
        What to call with bytes done, bytes in all, and the count.
    """
    if not sys.stderr.isatty():
        yield lambda done, total, tokens: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TextColumn("{task.fields[tokens]}"),
               TimeRemainingColumn())  # fmt: skip
    with Progress(TextColumn(label), *columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=None, tokens="")

        def update(done: int, total: int, tokens: int) -> None:
            elapsed = progress.tasks[0].elapsed or 0
            rate = f"{amount(tokens / elapsed, f'{unit}/s')}" if elapsed else ""
            progress.update(task, completed=done, total=total, tokens=rate)

        yield update
