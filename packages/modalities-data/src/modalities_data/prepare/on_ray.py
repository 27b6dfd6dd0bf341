"""Packing as tasks of a Ray cluster: the same function per unit, so the same bytes."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from modalities_core.errors import ConfigError, DataError, ModalitiesError, ResourceError
from modalities_data.inputs.units import Unit
from modalities_data.prepare.shards import Job, Report, UnitResult, committed, pack_unit
from modalities_data.prepare.workers import ONE_THREAD

SECONDS_BETWEEN_REPORTS = 0.5


def pack_on_ray(job: Job, units: dict[int, Unit], workers: int, report: Report) -> dict[int, UnitResult]:
    """Pack ``units`` on the cluster at ``RAY_ADDRESS``, or on one started on this machine.

    Every node has to see the inputs and the output's folder under the same paths.

    Args:
        job: the same for all.
        units: by their numbers.
        workers: how many CPUs a local cluster gets; a running one is used as far as it is free.
        report: told when a unit is done.

    Raises:
        ConfigError: Ray is not installed.
        DataError: what a task raised, or this machine does not see what a task wrote.
        ResourceError: a task was killed again and again.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError("run_on: ray needs Ray", hint='pip install "modalities-data[ray]"') from None
    started_here = not ray.is_initialized()
    if started_here:
        address = os.environ.get("RAY_ADDRESS")
        options: dict[str, Any] = {"address": address} if address else {"num_cpus": workers, "include_dashboard": False}
        ray.init(log_to_driver=False, **options)
    try:
        cpus = max(workers, int(ray.cluster_resources().get("CPU", workers)))
        variables = dict(ONE_THREAD)
        task = ray.remote(num_cpus=1, max_retries=3, runtime_env={"env_vars": variables})(_pack)
        shared = ray.put(job)
        waiting = iter(units.items())
        pending: dict[ray.ObjectRef, int] = {}
        results: dict[int, UnitResult] = {}
        while True:
            for number, unit in islice(waiting, 2 * cpus - len(pending)):
                pending[task.remote(shared, number, unit)] = number
            if not pending:
                return results
            finished, _ = ray.wait(list(pending), num_returns=1, timeout=SECONDS_BETWEEN_REPORTS)
            for reference in finished:
                number = pending.pop(reference)
                results[number] = _result(job.folder, number, ray.get(reference))
                done = results[number].shard
                report(sum(piece.bytes for piece in units[number]), done.tokens if done else 0)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else error
        raise cause from error
    except ray.exceptions.RayError as error:
        raise ResourceError(
            f"a packing task was lost: {str(error).splitlines()[0]}",
            hint="run the same command again: finished shards are kept",
        ) from error
    finally:
        if started_here:
            ray.shutdown()


def _pack(job: Job, number: int, unit: Unit) -> tuple[str, bytes]:
    """The task: the result as JSON, or what a user did wrong, as errors that take arguments do not travel well."""
    try:
        return "", msgspec.json.encode(pack_unit(job, number, unit, lambda new_bytes, new_tokens: None))
    except ModalitiesError as error:
        return type(error).__name__, msgspec.json.encode([error.message, error.hint])


def _result(folder: Path, number: int, returned: tuple[str, bytes]) -> UnitResult:
    kind, content = returned
    if kind:
        message, hint = msgspec.json.decode(content)
        raise {"ConfigError": ConfigError, "ResourceError": ResourceError}.get(kind, DataError)(message, hint=hint)
    if committed(folder, number) is None:
        raise DataError(
            f"{folder} here does not have what a Ray task wrote to it",
            hint="pack into a folder that every node of the cluster sees",
        )
    return msgspec.json.decode(content, type=UnitResult)
