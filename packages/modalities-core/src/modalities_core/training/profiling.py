"""Profiles of chosen steps: traces, memory snapshots and a table of the costliest operations."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from modalities_core.errors import ConfigError, first_line
from modalities_core.events import Profiled, Warned
from modalities_core.files import write_text
from modalities_core.interfaces import Training
from modalities_core.training.operations import costliest

LONGEST_HISTORY = 1_000_000
_log = logging.getLogger("modalities")


class Profile:
    """Records windows of steps with torch.profiler, on some ranks.

    Each window leaves a trace, for https://ui.perfetto.dev or chrome://tracing, and a table of the costliest
    operations. The step before a window warms the profiler up. Profiled steps are slower than others.

    Args:
        start: the first step of the window, or of each window, counted from 1 as in the log; 2 at least, if the
            profiler is to be warm.
        steps: how many steps a window has.
        ranks: which ranks record.
        memory: record memory too: per operation, and on a GPU a snapshot of every allocation in the window, for
            https://pytorch.org/memory_viz.
        rows: operations in the table.
        folder: where the files go; by default ``profile`` in the run's folder.

    Raises:
        ConfigError: a number is out of range, or windows overlap.
    """

    def __init__(
        self,
        start: int | Sequence[int] = 10,
        steps: int = 3,
        ranks: Sequence[int] = (0,),
        memory: bool = False,
        rows: int = 15,
        folder: Path | None = None,
    ) -> None:
        starts = sorted([start] if isinstance(start, int) else start)
        if steps < 1 or rows < 1:
            about = "steps" if steps < 1 else "rows"
            raise ConfigError(f"{about} has to be at least 1", about=(self, about))
        if not starts or starts[0] < 1:
            raise ConfigError("start has to be a step, counted from 1, or several", about=(self, "start"))
        if any(second < first + steps for first, second in pairwise(starts)):
            raise ConfigError(f"windows of {steps} steps from {starts} overlap", about=(self, "start"))
        if not ranks or min(ranks) < 0:
            raise ConfigError("ranks has to name one rank or more, from 0", about=(self, "ranks"))
        self.starts = tuple(starts)
        self.steps = steps
        self.ranks = frozenset(ranks)
        self.memory = memory
        self.rows = rows
        self.folder = folder
        self._training: Training | None = None
        self._profiler: profile | None = None

    def start(self, training: Training) -> None:
        """Begin at once if a window does."""
        if max(self.ranks) >= training.world.size:
            text = f"rank {max(self.ranks)} cannot be profiled: there are {training.world.size}"
            raise ConfigError(text, about=(self, "ranks"))
        late = [first for first in self.starts if first + self.steps - 1 > training.steps]
        if late:
            training.emit(Warned(f"the run ends with step {training.steps}, before the profile from step {late[0]} on"))
        self._training = training
        self._open_before(training.first_step + 1)

    def after_step(self, step: int) -> None:
        """Go on to the next step, or write down what was recorded."""
        training = self._training
        assert training is not None, "a hook is started before the first step"
        if self._profiler is not None:
            self._profiler.step()
        first = step - self.steps + 1
        if first in self.starts and first > training.first_step:
            table = self._finish(training, first)
            training.emit(Profiled(step, self._target(training), table))
        self._open_before(step + 1)

    def close(self) -> None:
        """Stop recording; a window that is not complete leaves nothing."""
        if self._profiler is not None:
            self._stop(self._profiler)
        self._training = None

    def _open_before(self, step: int) -> None:
        """Start the profiler if ``step``, the next one, belongs to a window or is the one before it."""
        assert self._training is not None
        if self._profiler is not None or self._training.world.rank not in self.ranks:
            return
        if not {step, step + 1} & set(self.starts):
            return
        warmup = 0 if step in self.starts else 1
        activities = [ProfilerActivity.CPU]
        if self._training.world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with warnings.catch_warnings():
            # That a window without a step to warm up is skewed is said in the documentation of ``start``.
            warnings.simplefilter("ignore")
            plan = schedule(wait=0, warmup=warmup, active=self.steps, repeat=1)
            self._profiler = profile(activities=activities, schedule=plan, profile_memory=self.memory)
            self._profiler.start()
        if self._snapshots():
            torch.cuda.memory._record_memory_history(max_entries=LONGEST_HISTORY)

    def _finish(self, training: Training, first: int) -> str:
        """Write the files of the window and return the table; empty on ranks that do not record."""
        profiler = self._profiler
        if profiler is None:
            return ""
        name = f"step-{first:08}-rank-{training.world.rank}"
        table = costliest(profiler.key_averages(), self.steps, self.rows, self.memory)
        try:
            folder = self._target(training)
            folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(folder / f"{name}.json.gz"))
            write_text(folder / f"{name}.txt", table + "\n")
            if self._snapshots():
                torch.cuda.memory._dump_snapshot(str(folder / f"{name}-memory.pickle"))
        except (OSError, RuntimeError) as error:
            message = f"rank {training.world.rank} could not write its profile: {first_line(error)}"
            _log.warning(message)
            training.emit(Warned(message))
        finally:
            self._stop(profiler)
        return table

    def _stop(self, profiler: profile) -> None:
        self._profiler = None
        profiler.stop()
        if self._snapshots():
            torch.cuda.memory._record_memory_history(enabled=None)

    def _snapshots(self) -> bool:
        """Whether to record allocations one by one; how is no public name of torch, so it may be missing."""
        names = ("_record_memory_history", "_dump_snapshot")
        return self.memory and torch.cuda.is_available() and all(hasattr(torch.cuda.memory, name) for name in names)

    def _target(self, training: Training) -> Path:
        return self.folder or training.folder / "profile"
