"""The README tells the truth: its commands run in the order they stand, and what it links to exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
DEV = "python3 tools/dev.py "


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip() and not line.startswith("#")]


def test_links_and_pictures_exist() -> None:
    for link in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert link.startswith("https://") or (ROOT / link.partition("#")[0]).exists(), link


def test_the_two_commands_come_first() -> None:
    assert commands()[:2] == [f"{DEV}modalities quickstart", f"{DEV}pytest"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_run(tmp_path: Path) -> None:
    # From a copy of the folders they name, so that nothing is written into the repository.
    for name in ("config_files", "examples", "packages"):
        (tmp_path / name).symlink_to(ROOT / name)
    bin_folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    # The first two are other tests: the quick start, and this test run itself.
    for line in commands()[2:]:
        words = shlex.split(line)
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip() or "schema" in line, f"{line} printed nothing"


def test_every_component_kind_of_the_status_table_is_registered() -> None:
    from modalities_core.registry import registry

    kinds = {entry.kind for entry in registry()}
    assert {"model", "optimizer", "schedule", "loss", "batches", "dataset", "tokenizer", "sink", "world"} <= kinds
