"""What the commands print: progress on a terminal, plain lines elsewhere, one JSON line for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click


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
