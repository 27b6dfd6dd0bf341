"""A run on the terminal: a bar that moves, lines that stay; plain lines where there is no terminal."""

from __future__ import annotations

from textwrap import indent

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from modalities_core.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    Generated,
    Profiled,
    RunEnded,
    RunStarted,
    StepLogged,
    Warned,
)

BAR_WIDTH = 12


def open_console() -> RichConsole:
    """Where the sink writes: standard output, as it is at the start of the run."""
    return RichConsole(highlight=False, soft_wrap=True)


class Console:
    """Shows loss, tokens per second, MFU and the time that is left.

    On a terminal the current step is a progress bar and all else lines above it; otherwise each event is a line, with
    gradient norm and learning rate as well. MFU is in PaLM's convention; ``(measured)`` says that it is the share of
    the fastest matrix product seen on this machine rather than of a data sheet's figure.
    """

    def __init__(self) -> None:
        self._console: RichConsole | None = None
        self._bar: Progress | None = None

    def consume(self, event: Event) -> None:
        """Show one event."""
        if self._console is None:
            self._console = open_console()
        if isinstance(event, RunStarted):
            self._start(event)
        elif isinstance(event, StepLogged) and self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=event.step, measures=bar_measures(event))
        else:
            if isinstance(event, RunEnded):
                self._stop_bar()
            self._print(line(event))

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._stop_bar()

    def _start(self, event: RunStarted) -> None:
        assert self._console is not None
        self._stop_bar()
        self._print(line(event))
        if self._console.is_terminal:
            columns = (MofNCompleteColumn(), BarColumn(BAR_WIDTH), TextColumn("{task.fields[measures]}"))
            self._bar = Progress(TextColumn("step"), *columns, TimeRemainingColumn(), console=self._console)
            self._bar.add_task("step", total=event.steps, completed=event.first_step, measures="")
            self._bar.start()

    def _print(self, text: str) -> None:
        assert self._console is not None
        style = "yellow" if text.startswith("warning") else None
        self._console.print(escape(text), style=style)

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def line(event: Event) -> str:
    """An event as one line of text, with what is longer indented below it."""
    match event:
        case RunStarted():
            start = f"from step {event.first_step} ({event.resumed_from}) " if event.resumed_from else ""
            ranks = f"{event.ranks} ranks" if event.ranks > 1 else "1 rank"
            return (
                f"training {start}to step {event.steps}: {event.parameters:,} parameters, "
                f"{event.tokens_per_step:,} tokens per step, {ranks} on {event.device}; folder {event.folder}"
            )
        case StepLogged():
            return f"step {event.step}/{event.steps}  {measures(event)}  {_left(event)}".rstrip()
        case Evaluated():
            bits = "" if event.bits_per_byte is None else f"  bits per byte {event.bits_per_byte:.4f}"
            counts = f"({event.tokens:,} tokens, {event.seconds:.1f} s)"
            quality = f"loss {event.loss:.4f}  perplexity {event.perplexity:.2f}{bits}"
            return f"step {event.step}  {event.name}: {quality}  {counts}"
        case CheckpointSaved():
            background = event.blocked_seconds < event.seconds
            waited = f", training waited {event.blocked_seconds:.2f} s" if background else ""
            size = f"{event.bytes / 1e6:,.1f} MB"
            return f"step {event.step}  saved {event.folder} ({size}, {event.seconds:.1f} s{waited})"
        case Generated():
            text = indent(printable(event.prompt + event.text), "    ", lambda line: True)
            return f"step {event.step}  sample:\n{text}"
        case Profiled():
            return f"step {event.step}  profiled, traces in {event.folder}\n{indent(event.table, '    ')}".rstrip()
        case Warned():
            return f"warning: {event.message}"
        case RunEnded():
            return f"{event.state} at step {event.step}" + (f": {event.reason}" if event.reason else "")


def printable(text: str) -> str:
    """Text that cannot steer the terminal: control characters but line breaks and tabs are replaced."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def measures(event: StepLogged) -> str:
    """The numbers of a step."""
    parts = [
        f"loss {event.loss:.4f}",
        f"gradient norm {event.gradient_norm:.3g}",
        f"lr {event.learning_rate:.3g}",
        f"{event.tokens_per_second:,.0f} tokens/s",
    ]
    if event.mfu is not None:
        parts.append(f"MFU {event.mfu:.1%}" + (" (measured)" if event.peak_measured else ""))
    if event.noise_scale is not None:
        parts.append(f"noise scale {event.noise_scale:,.0f} tokens")
    if event.skipped_steps:
        parts.append(f"{event.skipped_steps} skipped")
    return "  ".join(parts)


def bar_measures(event: StepLogged) -> str:
    """The numbers that fit beside a bar on a terminal of 80 columns; the others are in the record."""
    mfu = "" if event.mfu is None else f"  MFU {event.mfu:.0%}"
    return f"loss {event.loss:.4f}  {event.tokens_per_second:,.0f} tokens/s{mfu}"


def _left(event: StepLogged) -> str:
    seconds = event.seconds.get("step", 0.0) * (event.steps - event.step)
    if seconds <= 0:
        return ""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02} left"
