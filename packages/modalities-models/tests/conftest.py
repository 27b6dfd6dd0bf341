"""One thread: the tests' matrices are too small for more, and other processes may share the cores."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def on_two_ranks(tmp_path: Path) -> Callable[[str], None]:
    """Run a script as two processes, each given its rank and where they meet; both have to end with "equal"."""

    def run(script: str) -> None:
        path = tmp_path / "rank.py"
        # A plain exit after FSDP2 work sometimes aborts in gloo's threads, long after the script has done its checks.
        path.write_text(script + "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n")
        ranks = [
            subprocess.Popen(
                [sys.executable, path, str(rank), tmp_path / "store"],
                env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            outputs = [process.communicate(timeout=180)[0] for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        assert [process.returncode for process in ranks] == [0, 0], "\n".join(outputs)
        assert all(output.endswith("equal\n") for output in outputs)

    return run
