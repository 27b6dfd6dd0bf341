"""A virtual environment per peer, made once under the cache folder."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
INSTALL_SECONDS = 1200


@dataclass(frozen=True)
class Environment:
    """What a peer needs.

    name: of the folder.
    steps: the words after ``pip install``, one list per call, in order.
    shows: distributions whose version goes into the result.
    """

    name: str
    steps: tuple[tuple[str, ...], ...]
    shows: tuple[str, ...]


@dataclass(frozen=True)
class Made:
    """A finished environment."""

    python: str
    versions: dict[str, str]

    def script(self, name: str) -> str:
        """A program that was installed beside the interpreter."""
        return str(Path(self.python).with_name(name))

    def variables(self) -> dict[str, str]:
        """What a command of a peer runs with, so that it finds its own packages and not those of this process."""
        return {} if self.python == sys.executable else {"PYTHONPATH": ""}


class InstallError(Exception):
    """A peer does not install; the text says why."""


def make(cache: Path, environment: Environment) -> Made:
    """Make an environment, or take the one that is there.

    Raises:
        InstallError: pip failed. That is remembered: remove the folder to try again.
    """
    folder = cache / "environments" / environment.name
    stamp = folder / "bench.json"
    wanted = hashlib.sha256(repr((sys.version, environment.steps, CONSTRAINTS.read_text())).encode()).hexdigest()
    known = json.loads(stamp.read_text()) if stamp.is_file() else {}
    if known.get("wanted") != wanted:
        print(f"installing {environment.name} ...", file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        known = {"wanted": wanted, **_install(folder, environment)}
        stamp.write_text(json.dumps(known))
    if "failed" in known:
        raise InstallError(known["failed"])
    return Made(str(folder / "bin" / "python"), known["versions"])


def _install(folder: Path, environment: Environment) -> dict:
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    for step in environment.steps:
        command = [python, "-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS), *step]
        try:
            found = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return {"failed": f"pip install {' '.join(step)} took longer than {INSTALL_SECONDS} s"}
        if found.returncode:
            lines = [line for line in found.stderr.splitlines() if "error" in line.lower()] or ["pip failed"]
            return {"failed": f"pip install {' '.join(step)}: {lines[0].strip()}"}
    return {"versions": versions(python, environment.shows)}


def versions(python: str, names: tuple[str, ...]) -> dict[str, str]:
    """Versions of distributions in an environment."""
    code = "import sys, json, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    found = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(found.stdout)
