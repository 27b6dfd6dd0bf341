"""How test runs are spread over processes, and what they do once before the first test."""

from __future__ import annotations

import gc
import os
import re

import pytest

MOST_PROCESSES = 4


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Choose as many processes as there are cores, up to four, unless ``-n`` says how many.

    What is named by its path stays in this process, where a debugger and ``-s`` work, and so do tests on a GPU, which
    would share its memory.
    """
    if hasattr(config, "workerinput"):
        return  # this is one of the processes, and must not start others
    options = config.option
    named = bool(options.file_or_dir) or options.collectonly or options.usepdb or options.capture == "no"
    on_gpu = re.search(r"(?<!not )\bgpu\b", options.markexpr) is not None
    if named or on_gpu or not config.pluginmanager.hasplugin("xdist") or options.numprocesses is not None:
        return
    cores = os.cpu_count() or 1
    options.numprocesses = min(cores, MOST_PROCESSES)
    # A file's tests share what is made once for them.
    options.dist = "loadfile"
    # Threads of all processes together are as many as cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // options.numprocesses)))


def pytest_collection_finish() -> None:
    """Set apart what has been loaded: each training run collects garbage, which would look through all of it."""
    gc.collect()
    gc.freeze()
