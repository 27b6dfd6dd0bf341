"""TensorBoard: measures as scalars, samples and profiles as text."""

from __future__ import annotations

import os
import socket
import time
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

from modalities_core.config.document import dump
from modalities_core.events import Event, Generated, Profiled, RunStarted
from modalities_core.interfaces import Sink
from modalities_core.sinks.background import Background
from modalities_core.sinks.extras import require
from modalities_core.sinks.measures import measures
from modalities_core.sinks.settings import settings

_numbers = count()


def tensorboard(path: Path | None = None) -> Sink:
    """Writes measures, samples of text and the configuration for TensorBoard.

    ``tensorboard --logdir runs`` shows all runs below ``runs``. A resumed run goes on in its own curves.

    Args:
        path: of the log folder; by default ``tensorboard`` in the run's folder.

    Raises:
        ConfigError: tensorboard is not installed.
    """
    require("tensorboard", "tensorboard")
    return Background(EventFile(path), "TensorBoard")


class EventFile:
    """An event file of TensorBoard, each event at once on disk. What raises is worth a try later, in a new file.

    Args:
        path: of the log folder, or None for ``tensorboard`` in the run's folder.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._records: Any = None
        self._started: RunStarted | None = None

    def consume(self, event: Event) -> None:
        """Write what the event says."""
        try:
            if isinstance(event, RunStarted):
                # A run that goes back to a checkpoint starts a second time.
                self.close()
                self._started = event
                self._open(event)
            elif values := _values(event):
                if self._records is None and self._started is not None:
                    self._open(self._started)
                self._write(getattr(event, "step", 0), summary=values)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        records, self._records = self._records, None
        if records is not None:
            records.close()

    def _open(self, started: RunStarted) -> None:
        records: Any = import_module("tensorboard.summary.writer.record_writer")
        session: Any = import_module("tensorboard.compat.proto.event_pb2").SessionLog
        folder = self._path or started.folder / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self._records = records.RecordWriter((folder / name).open("xb"))
        self._write(0, file_version="brain.Event:2")
        # Steps that an interrupted run took beyond its last checkpoint are taken again.
        self._write(started.first_step + 1, session_log=session(status=session.START))
        if tree := settings(started.folder):
            self._write(0, summary=_text("config", f"```yaml\n{dump(tree)}\n```"))

    def _write(self, step: int, **what: Any) -> None:
        record: Any = import_module("tensorboard.compat.proto.event_pb2").Event
        self._records.write(record(wall_time=time.time(), step=step, **what).SerializeToString())
        self._records.flush()


def _values(event: Event) -> Any:
    """An event as a Summary; None where there is nothing to show."""
    if isinstance(event, Generated):
        return _text(f"samples/{event.prompt!r}", f"```\n{event.prompt}{event.text}\n```")
    if isinstance(event, Profiled):
        return _text("profile", f"```\n{event.table}\n```")
    summary: Any = import_module("tensorboard.compat.proto.summary_pb2").Summary
    values = [summary.Value(tag=name, simple_value=number) for name, number in measures(event).items()]
    return summary(value=values) if values else None


def _text(tag: str, text: str) -> Any:
    text_plugin: Any = import_module("tensorboard.plugins.text.summary_v2")
    return text_plugin.text_pb(tag, text)
