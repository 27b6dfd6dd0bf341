"""Weights & Biases: measures, samples of text and the configuration of a run."""

from __future__ import annotations

import errno
import html
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from modalities_core.errors import first_line
from modalities_core.events import Event, Generated, Profiled, RunEnded, RunStarted
from modalities_core.files import write_json
from modalities_core.interfaces import Sink
from modalities_core.sinks.background import Background, Degraded
from modalities_core.sinks.extras import require
from modalities_core.sinks.measures import measures
from modalities_core.sinks.settings import has_secret, settings

OLDEST = (0, 31)
STEP = "step"
LEAST_ROOM = 1 << 20
EXIT_CODES = {"done": 0, "interrupted": 255}
_log = logging.getLogger("modalities")


def wandb(
    project: str = "modalities",
    name: str | None = None,
    entity: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    mode: Literal["online", "offline", "disabled"] | None = None,
    timeout: float = 30.0,
) -> Sink:
    """Sends measures, samples of text and the configuration to Weights & Biases.

    The key comes from the environment or ``wandb login``, never from the configuration. Where the server cannot be
    reached, the run is recorded offline, for ``wandb sync``. A resumed run goes on in the same run.

    Args:
        project: that the run belongs to.
        name: of the run; by default that of its folder.
        entity: user or team; by default the user's own.
        group: of runs that belong together.
        tags: to find the run by.
        mode: ``offline`` records in the run's folder for ``wandb sync``, ``disabled`` does nothing; by default what the
            environment variable WANDB_MODE says, else ``online``.
        timeout: seconds to wait for the server, at the start before it is offline, and at the end.

    Raises:
        ConfigError: wandb is not installed, or too old.
    """
    mode = mode or _mode_of_environment()
    if mode == "disabled":
        return Disabled()
    require("wandb", "wandb", OLDEST)
    about = {"project": project, "name": name, "entity": entity, "group": group, "tags": list(tags)}
    return Background(WandbRun(about, mode, timeout), "Weights & Biases", patience=2 * timeout + 10)


class Disabled:
    """Takes events and does nothing."""

    def consume(self, event: Event) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class WandbRun:
    """One run of Weights & Biases, made or resumed when the training starts.

    Args:
        about: arguments of ``wandb.init``.
        mode: online or offline.
        timeout: seconds to wait for the server.
    """

    def __init__(self, about: dict[str, Any], mode: Literal["online", "offline"], timeout: float) -> None:
        self._about = about
        self._mode: Literal["online", "offline"] = mode
        self._timeout = timeout
        self._run: Any = None
        self._offline = False
        self._folder = Path()

    def consume(self, event: Event) -> None:
        """Hand one event on; ``wandb.init`` waits for the server, the others do not."""
        if isinstance(event, RunStarted):
            # A run that goes back to a checkpoint starts a second time, as the same run.
            if self._run is None:
                self._start(event)
        elif isinstance(event, RunEnded):
            self._end(event.state)
        elif self._run is not None and (values := _values(event)):
            _check_room(self._folder)
            # Not W&B's own step, which refuses to go back when a run is resumed from a checkpoint.
            self._run.log({STEP: getattr(event, STEP, 0), **values})

    def close(self) -> None:
        """Let go of a run that has not ended."""
        self._end("failed")

    def _start(self, started: RunStarted) -> None:
        library: Any = import_module("wandb")
        quiet: dict[str, Any] = {"silent": True, "console": "off"}
        quiet |= {"init_timeout": self._timeout, "finish_timeout": self._timeout}
        if has_secret():
            # Its metadata would hold the command line.
            quiet["x_disable_meta"] = True
        library.setup(library.Settings(**quiet))
        arguments = {**self._about, "name": self._about["name"] or started.folder.resolve().name}
        arguments |= {"dir": str(started.folder), "config": settings(started.folder), "resume": "allow"}
        arguments |= {"id": run_id(started.folder), "settings": library.Settings(**quiet)}
        reason = ""
        if self._mode == "online":
            try:
                self._run = self._online(library, arguments)
            except (library.Error, ValueError) as error:
                # The service still holds the run that did not come about.
                library.teardown()
                library.setup(library.Settings(**quiet))
                reason = first_line(error)
        self._offline, self._folder = self._run is None, started.folder
        if self._run is None:
            self._run = library.init(mode="offline", **arguments)
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)
        if reason:
            path = started.folder / "wandb"
            raise Degraded(f"Weights & Biases is offline ({reason}); later: wandb sync {path / 'offline-run-*'}")
        _log.info("Weights & Biases: %s", self._run.url or f"offline in {started.folder / 'wandb'}")

    def _online(self, library: Any, arguments: dict[str, Any]) -> Any:
        # Never ask at the terminal of a run.
        if not library.login(prompt=False, verify=False):
            raise library.Error("no API key: set WANDB_API_KEY or run `wandb login`")
        return library.init(mode="online", **arguments)

    def _end(self, state: str) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        if state == "preempted":
            run.mark_preempting()
        record = Path(run.settings.sync_file)
        before = _size(record)
        run.finish(exit_code=EXIT_CODES.get(state, 1))
        if self._offline and not _grows(record, before):
            # Its service does not tell.
            raise Degraded(f"Weights & Biases could not write the end of {record}: is the disk full?")
        if getattr(run, "_finish_timed_out", False):
            raise Degraded(f"Weights & Biases has not taken all of the run; later: wandb sync {run.settings.sync_dir}")


def run_id(folder: Path) -> str:
    """The id under which the run in ``folder`` is known, kept there for the day it is resumed."""
    path = folder / "wandb" / "run.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["id"]
    except (OSError, ValueError, KeyError, TypeError):
        number = uuid.uuid4().hex[:12]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"id": number})
    return number


def _check_room(folder: Path) -> None:
    """Refuse to hand on what would be lost: the service behind wandb does not tell of a full disk."""
    if shutil.disk_usage(folder).free < LEAST_ROOM:
        raise OSError(errno.ENOSPC, "no room left on the disk", str(folder))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _grows(path: Path, size: int) -> bool:
    """Whether a file gets larger than ``size`` within some seconds."""
    for _ in range(30):
        if _size(path) > size:
            return True
        time.sleep(0.1)
    return False


def _values(event: Event) -> dict[str, Any]:
    if not isinstance(event, (Generated, Profiled)):
        return dict(measures(event))
    page: Any = import_module("wandb").Html
    if isinstance(event, Profiled):
        return {"profile": page(f"<pre>{html.escape(event.table)}</pre>", inject=False)}
    text = f"<pre><b>{html.escape(event.prompt)}</b>{html.escape(event.text)}</pre>"
    return {f"samples/{event.prompt!r}": page(text, inject=False)}


def _mode_of_environment() -> Literal["online", "offline", "disabled"]:
    match os.environ.get("WANDB_MODE", "").lower():
        case "offline" | "dryrun":
            return "offline"
        case "disabled":
            return "disabled"
    return "online"
