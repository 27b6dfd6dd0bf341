"""Events as lines of JSON: the record that every other view of a run can be made from."""

from __future__ import annotations

import json
import math
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

from modalities_core.events import CheckpointSaved, Evaluated, Event, Generated, Profiled, RunStarted, StepLogged
from modalities_core.files import replacing


class JsonLines:
    """Appends one JSON object per event, at once readable by others.

    An object has ``event``, ``time`` in seconds since 1970, and the event's fields. Numbers that are not finite are
    the strings ``nan``, ``inf`` and ``-inf``, since JSON has none.

    A run that goes on from a checkpoint repeats the steps after it. What the file says about those moves to a
    neighbour, ``metrics.abandoned.jsonl``, so that every step stands here once: steps, checkpoints, samples and
    profiles after the first step of the new process, and evaluations from it on, which are repeated where they are
    due.

    Args:
        file_name: of the file, relative to the run's folder.
    """

    def __init__(self, file_name: str = "metrics.jsonl") -> None:
        self.file_name = file_name
        self._stream: TextIO | None = None
        self._waiting: list[str] = []

    def consume(self, event: Event) -> None:
        """Write one line; events before the run's start wait for it, since only it tells the folder."""
        if isinstance(event, RunStarted):
            self._open(event)
        line = json.dumps(record(event), ensure_ascii=False, allow_nan=False) + "\n"
        if self._stream is None:
            self._waiting.append(line)
            return
        self._stream.write("".join(self._waiting) + line)
        self._waiting.clear()
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._waiting.clear()
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _open(self, event: RunStarted) -> None:
        if self._stream is not None:
            self._stream.close()
        path = event.folder / self.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            supersede(path, event.first_step)
        self._stream = path.open("a", encoding="utf-8")


def record(event: Event) -> dict[str, Any]:
    """An event as JSON values."""
    values = {field.name: _json_value(getattr(event, field.name)) for field in fields(event)}
    return {"event": event_name(event), "time": time.time(), **values}


def event_name(event: Event) -> str:
    """The event's class in snake case."""
    return _snake_case(type(event))


def _snake_case(kind: type) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in kind.__name__).lstrip("_")


# Events of a step, which a run that goes on from an earlier one repeats.
_REPEATED = {_snake_case(kind) for kind in (StepLogged, Evaluated, CheckpointSaved, Generated, Profiled)}


def supersede(path: Path, first_step: int) -> None:
    """Move the lines that a run going on from ``first_step`` will write again, and torn ones, to a neighbour file."""
    kept: list[str] = []
    moved: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n"):
        (kept if _stays(line, first_step) else moved).append(line + "\n")
    if not moved:
        return
    # Appended first: a crash in between leaves a line twice, never lost.
    with path.with_name(f"{path.stem}.abandoned{path.suffix}").open("a", encoding="utf-8") as stream:
        stream.writelines(moved)
    with replacing(path) as stream:
        stream.write("".join(kept).encode())


def _stays(line: str, first_step: int) -> bool:
    try:
        values = json.loads(line)
        name = values["event"]
        if name == _snake_case(Evaluated):
            return values["step"] < first_step
        if name in _REPEATED:
            return values["step"] <= first_step and first_step > 0
    except (ValueError, KeyError, TypeError):
        return False
    return first_step > 0


def _json_value(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): _json_value(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value
