"""What has no peer to run beside: finding lines, with the memory bandwidth as its limit, and planning best-fit packing.

Each is called in this process, so its time is its own and no start counts.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

FILE_BYTES = 256 << 20
LINE_BYTES = (100, 6000)
REPEATS = 5
SEQUENCE_LENGTH = 2048
CHUNK = 1 << 22


def figures(cache: Path, documents: int) -> dict:
    """All of them; a part whose function this version of the package does not have is None."""
    return {
        "memory_bandwidth": memory_bandwidth(),
        "read": {str(size): read_rate(cache, size) for size in LINE_BYTES},
        "index": {str(size): index_rate(cache, size) for size in LINE_BYTES},
        "best_fit": best_fit(documents),
    }


def best_seconds(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """CPU seconds of the fastest of some calls."""
    found = []
    for _ in range(repeats):
        began = time.process_time()
        call()
        found.append(time.process_time() - began)
    return min(found)


def memory_bandwidth() -> float:
    """Bytes read and written per second by copying an array that no cache holds."""
    source = np.ones(FILE_BYTES // 8, np.float64)
    target = np.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: np.copyto(target, source))


def lines_file(cache: Path, line_bytes: int) -> Path:
    """A JSONL file whose lines all have ``line_bytes`` bytes, made once."""
    path = cache / f"lines-{line_bytes}.jsonl"
    if not path.is_file() or path.stat().st_size < FILE_BYTES // 2:
        line = b'{"text": "' + b"x" * (line_bytes - 13) + b'"}\n'
        assert len(line) == line_bytes
        path.write_bytes(line * (FILE_BYTES // line_bytes))
    return path


def read_rate(cache: Path, line_bytes: int) -> float:
    """Bytes per CPU second of reading the file from the page cache, a megabyte at a time: no index is faster."""
    path = lines_file(cache, line_bytes)
    buffer = bytearray(1 << 20)

    def read() -> None:
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass

    return path.stat().st_size / best_seconds(read)


def index_rate(cache: Path, line_bytes: int) -> float | None:
    """Bytes per CPU second of our index of the file's lines, its checksum and its writing among them."""
    index = _function("modalities_data.prepare.index", "index_lines")
    if index is None:
        return None
    path = lines_file(cache, line_bytes)
    return path.stat().st_size / best_seconds(lambda: index(path))


def best_fit(documents: int) -> dict | None:
    """Seconds to plan best-fit packing of log-normal documents into samples of 2048, and how full the samples are."""
    plan = _function("modalities_data.datasets.fitting", "plan")
    if plan is None:
        return None
    random = np.random.default_rng(0)
    lengths = np.concatenate([
        np.minimum(random.lognormal(6.0, 1.2, count), 1e6).astype(np.int32) + 2
        for count in [CHUNK] * (documents // CHUNK) + [documents % CHUNK]
    ])  # fmt: skip
    began = time.process_time()
    made = plan(lambda: [lengths], SEQUENCE_LENGTH)
    seconds = time.process_time() - began
    assert made.tokens >= int(lengths.sum(dtype=np.int64))  # a piece of a long document repeats one token
    fill = made.tokens / (len(made) * (SEQUENCE_LENGTH + 1))
    return {"documents": documents, "seconds": seconds, "samples": len(made), "fill": fill}


def _function(module: str, name: str) -> Callable | None:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None


def report(found: dict) -> list[str]:
    """Lines of Markdown."""
    lines = [
        "## Index and plan",
        "",
        f"Memory bandwidth (copy, read + write): {found['memory_bandwidth'] / 1e9:.1f} GB/s.",
    ]
    for size, rate in found["index"].items():
        limit = f"reading alone: {found['read'][size] / 1e9:.2f} GB/s"
        said = "no such function in this version" if rate is None else f"{rate / 1e9:.2f} GB/s"
        lines.append(f"Index of {size}-byte lines: {said} ({limit}).")
    plan = found["best_fit"]
    if plan is None:
        lines.append("Best-fit planning: no such function in this version.")
    else:
        fill = f", samples {100 * plan['fill']:.3f} % full"
        lines.append(f"Best-fit planning of {plan['documents']:.0e} documents: {plan['seconds']:.2f} CPU s{fill}.")
    return [*lines, ""]
