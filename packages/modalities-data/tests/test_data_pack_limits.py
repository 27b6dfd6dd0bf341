"""Packing at its limits: killed at fifty random points, and memory that does not grow with the corpus."""

from __future__ import annotations

import gzip
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from modalities_data.inputs.files import InputFile
from modalities_data.inputs.units import unit_bytes
from modalities_data.prepare.pack import pack
from modalities_data.tokenizers.bytes import BytesTokenizer

KILLS = 50
PACK = """
import sys
from pathlib import Path
from modalities_data.prepare.pack import pack
from modalities_data.tokenizers.bytes import BytesTokenizer

if __name__ == "__main__":
    print("ready", flush=True)
    pack(Path(sys.argv[1]), Path(sys.argv[2]), BytesTokenizer(), workers=int(sys.argv[3]), range_bytes=20_000)
    print("done", flush=True)
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def start(source: Path, output: Path, workers: int) -> subprocess.Popen[str]:
    """A packing process that is about to begin."""
    process = subprocess.Popen(
        [sys.executable, "-c", PACK, str(source), str(output), str(workers)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def seconds_to_the_end(source: Path, output: Path) -> float:
    """How long a process that nobody kills takes from here."""
    process = start(source, output, 1)
    began = time.monotonic()
    assert process.stdout is not None and process.stdout.readline() == "done\n"
    seconds = time.monotonic() - began
    process.communicate(timeout=60)
    shutil.rmtree(output)
    return seconds


@pytest.mark.slow
def test_fifty_kills_at_random_points(lorem_file, tmp_path) -> None:
    duration = min(seconds_to_the_end(lorem_file, tmp_path / "expected") for _ in range(3))
    pack(lorem_file, tmp_path / "expected", BytesTokenizer(), workers=1, range_bytes=20_000)
    expected = contents(tmp_path / "expected")
    assert len(expected) > 20
    rng = random.Random(0)
    finished = taken_up = 0
    for number in range(KILLS):
        output = tmp_path / "out"
        # Two workers need time to start, in which a kill is a case of its own.
        workers = 2 if number % 10 == 0 else 1
        process = start(lorem_file, output, workers)
        time.sleep(rng.uniform(0, duration if workers == 1 else duration + 1))
        process.kill()
        stdout, _ = process.communicate(timeout=60)
        if output.exists():
            # The name was given: all is there, whether or not the process had time to say so.
            finished += 1
        else:
            assert not stdout
            report = pack(lorem_file, output, BytesTokenizer(), workers=1, range_bytes=20_000)
            taken_up += report.shards_reused > 0
        assert contents(output) == expected, f"kill {number}"
        leftovers = {path.name for path in tmp_path.iterdir()} - {"expected", "out"}
        assert not leftovers
        for path in output.iterdir():
            path.unlink()
        output.rmdir()
    assert taken_up > KILLS // 4, (taken_up, finished)


PEAK = """
import re, sys
from pathlib import Path
from modalities_data.prepare.pack import pack
from modalities_data.tokenizers.bytes import BytesTokenizer

report = pack(Path(sys.argv[1]), Path(sys.argv[2]), BytesTokenizer(), workers=1)
# Not ru_maxrss: that starts at what the process that launched this one had.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]
print(report.manifest.documents, peak)
"""


def write_words(path: Path, megabytes: int) -> None:
    """Documents of 4 kB of ever new words."""
    rng = np.random.default_rng(0)
    with gzip.open(path, "wb", 1) if path.suffix == ".gz" else path.open("wb") as stream:
        for _ in range(megabytes):
            letters = rng.integers(97, 123, (250, 4000), np.uint8)
            letters[:, rng.integers(0, 4000, 700)] = 32
            stream.writelines(b'{"text": "' + row.tobytes() + b'"}\n' for row in letters)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_memory_does_not_grow_with_the_corpus(script, tmp_path, ending) -> None:
    """With the bytes tokenizer, as engines keep caches of their own."""
    peaks = []
    for megabytes in (20, 80):
        source = tmp_path / f"{megabytes}{ending}"
        write_words(source, megabytes)
        done = script(PEAK, source, tmp_path / f"out-{megabytes}", timeout=200)
        assert done.returncode == 0, done.stderr
        documents, kilobytes = map(int, done.stdout.split())
        assert documents == 250 * megabytes
        peaks.append(kilobytes / 1024)
    print(f"peak memory: {peaks[0]:.0f} MiB at 20 MB, {peaks[1]:.0f} MiB at 80 MB")
    assert peaks[1] < 200
    assert peaks[1] < peaks[0] + 15


@pytest.mark.parametrize(
    ("gibibytes", "mebibytes"), [([0.001], 64), ([200, 56], 64), ([200, 56.1], 128), ([4000], 1024), ([10] * 400, 1024)]
)
def test_units_grow_with_the_input_so_that_shards_stay_few(gibibytes, mebibytes) -> None:
    files = [InputFile(str(n), "jsonl", "", int(size * 2**30), "") for n, size in enumerate(gibibytes)]
    assert unit_bytes(files) == mebibytes << 20
    assert sum(file.bytes for file in files) / unit_bytes(files) <= 4096


def test_what_units_have_stands_in_the_manifest(lorem_file, tmp_path) -> None:
    made = pack(lorem_file, tmp_path / "default", BytesTokenizer(), workers=1).manifest
    asked = pack(lorem_file, tmp_path / "asked", BytesTokenizer(), workers=1, range_bytes=64 << 20).manifest
    assert made == asked and made.options["range_bytes"] == 64 << 20
