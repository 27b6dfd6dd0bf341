"""MLflow: measures, samples of text and the configuration of a run."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from modalities_core.events import Event, Generated, Profiled, RunEnded, RunStarted
from modalities_core.files import write_json
from modalities_core.interfaces import Sink
from modalities_core.sinks.background import Background
from modalities_core.sinks.extras import require
from modalities_core.sinks.measures import measures
from modalities_core.sinks.settings import flat, settings

STATES = {"done": "FINISHED", "failed": "FAILED"}
PARAMETERS_PER_CALL = 100
LONGEST_PARAMETER = 500
_NOT_IN_A_NAME = re.compile(r"[^\w\-. :/]")


def mlflow(
    tracking_uri: str | None = None,
    experiment: str = "modalities",
    run_name: str | None = None,
    tags: Mapping[str, str] | None = None,
    timeout: float = 30.0,
) -> Sink:
    """Sends measures, samples of text and the configuration to MLflow.

    Credentials come from MLflow's environment variables, never from the configuration. A resumed run goes on in the
    same run.

    Args:
        tracking_uri: of the server or store; by default what MLflow says, such as MLFLOW_TRACKING_URI.
        experiment: that the run belongs to; made if it is not there.
        run_name: of the run; by default that of its folder.
        tags: to find the run by.
        timeout: seconds for one request, and to wait at the end.

    Raises:
        ConfigError: mlflow is not installed.
    """
    require("mlflow", "mlflow")
    run = MlflowRun(tracking_uri, experiment, run_name, dict(tags or {}), timeout)
    return Background(run, "MLflow", patience=timeout)


class MlflowRun:
    """One run of MLflow, made or resumed when the training starts.

    Args:
        tracking_uri: or None for MLflow's own choice.
        experiment: its name.
        run_name: or None for the name of the run's folder.
        tags: of the run.
        timeout: seconds for one request.
    """

    def __init__(
        self, tracking_uri: str | None, experiment: str, run_name: str | None, tags: dict[str, str], timeout: float
    ) -> None:
        self._uri = tracking_uri
        self._experiment = experiment
        self._name = run_name
        self._tags = tags
        self._timeout = timeout
        self._client: Any = None
        self._id = ""

    def consume(self, event: Event) -> None:
        """Hand one event on and wait until it is taken."""
        if isinstance(event, RunStarted):
            self._start(event)
        elif isinstance(event, RunEnded):
            self._client.set_terminated(self._id, STATES.get(event.state, "KILLED"))
        elif isinstance(event, (Generated, Profiled)):
            self._client.log_text(self._id, *_text(event))
        elif found := measures(event):
            self._log(found, getattr(event, "step", 0))

    def close(self) -> None:
        """Nothing is held open."""

    def _start(self, started: RunStarted) -> None:
        # MLflow's own patience is several minutes; what fails is tried again anyway.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(max(1, round(self._timeout))))
        client: Any = import_module("mlflow.tracking").MlflowClient(tracking_uri=self._uri)
        path = started.folder / "mlflow.json"
        self._id = _known_id(path)
        if self._id:
            client.update_run(self._id, status="RUNNING")
        else:
            name = self._name or started.folder.resolve().name
            self._id = client.create_run(self._experiment_id(client), run_name=name, tags=self._tags).info.run_id
            write_json(path, {"id": self._id})
        self._client = client
        self._parameters(flat(settings(started.folder)))

    def _experiment_id(self, client: Any) -> str:
        found = client.get_experiment_by_name(self._experiment)
        if found is not None:
            return found.experiment_id
        return client.create_experiment(self._experiment)

    def _parameters(self, values: dict[str, str]) -> None:
        param: Any = import_module("mlflow.entities").Param
        # A parameter cannot change, so those of the first start stand.
        known = self._client.get_run(self._id).data.params
        new = [param(name, _shortened(text)) for key, text in values.items() if (name := _name(key)) not in known]
        for start in range(0, len(new), PARAMETERS_PER_CALL):
            self._client.log_batch(self._id, params=new[start : start + PARAMETERS_PER_CALL])

    def _log(self, found: dict[str, float], step: int) -> None:
        metric: Any = import_module("mlflow.entities").Metric
        now = round(time.time() * 1000)
        self._client.log_batch(self._id, [metric(_name(name), value, now, step) for name, value in found.items()])


def _known_id(path: Path) -> str:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["id"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _name(text: str) -> str:
    """A name that MLflow takes."""
    return _NOT_IN_A_NAME.sub("_", text)[:250]


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_PARAMETER else text[: LONGEST_PARAMETER - 3] + "..."


def _text(event: Generated | Profiled) -> tuple[str, str]:
    """The text of an event and the name of the file it goes to."""
    if isinstance(event, Profiled):
        return event.table, f"profile/step-{event.step:08}.txt"
    prompt = re.sub(r"\W+", "-", event.prompt).strip("-")[:40] or "text"
    return event.prompt + event.text, f"samples/step-{event.step:08}-{prompt}.txt"
