"""Run a command in the repository's own environment, making it first where it is missing or stale.

    python3 tools/dev.py modalities quickstart
    python3 tools/dev.py pytest

Needs Python 3.11 or newer with venv and pip, nothing else. The environment is the folder ``.venv`` beside ``VERSION``:
the five packages, editable, and the development group of ``pyproject.toml``, under ``constraints.txt``. Without a
command, it only makes the environment.
"""

import sys

if sys.version_info < (3, 11):  # before anything an older Python cannot read
    print("tools/dev.py: needs Python 3.11 or newer, this is " + sys.version.split()[0], file=sys.stderr)
    print("  try: python3.11 tools/dev.py ...", file=sys.stderr)
    sys.exit(2)

import hashlib
import os
import shutil
import signal
import subprocess
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
SCRIPTS = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = SCRIPTS / ("python.exe" if os.name == "nt" else "python")
STAMP = VENV / "dev.stamp"


def packages() -> list[Path]:
    """The folders of the packages, in a fixed order."""
    return sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))


def requirements() -> list[str]:
    """What pip is asked for: every package, editable, then the development group."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    return [word for folder in packages() for word in ("--editable", str(folder))] + groups["dev"]


def fingerprint() -> str:
    """Changes whenever the environment has to be made anew: what is installed, by which Python, and where."""
    digest = hashlib.sha256("\n".join([sys.version, sys.base_prefix, *requirements()]).encode())
    for path in [ROOT / "VERSION", ROOT / "constraints.txt", *(folder / "pyproject.toml" for folder in packages())]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_current() -> bool:
    """Whether the environment was finished for today's fingerprint and its Python is still there."""
    return STAMP.is_file() and PYTHON.exists() and STAMP.read_text(encoding="utf-8") == fingerprint()


def make_environment() -> int:
    """Make ``.venv`` from nothing; the stamp is written last, so that a half-made one counts as stale."""
    what = "replacing the stale .venv" if VENV.exists() else "making .venv"
    print(f"tools/dev.py: {what}, which takes one to five minutes ...", file=sys.stderr, flush=True)
    started = time.monotonic()
    if VENV.is_symlink():
        sys.exit(f"tools/dev.py: {VENV} is a link; remove it, so that nothing outside the repository is overwritten")
    STAMP.unlink(missing_ok=True)
    shutil.rmtree(VENV, ignore_errors=True)
    # Not sys.executable: that may be the Python of the environment just removed.
    python = getattr(sys, "_base_executable", sys.executable)
    made = subprocess.run([python, "-m", "venv", str(VENV)]).returncode
    if made != 0:
        print("tools/dev.py: python -m venv failed; on Debian it is in the package python3-venv", file=sys.stderr)
        return made
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    status = subprocess.run([*pip, "--constraint", str(ROOT / "constraints.txt"), *requirements()]).returncode
    if status != 0:
        print("tools/dev.py: pip could not install the packages; see above", file=sys.stderr)
        return status
    STAMP.write_text(fingerprint(), encoding="utf-8")
    print(f"tools/dev.py: made .venv in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return 0


def run(command: list[str]) -> int:
    """Run ``command`` with the environment's scripts first on the path and return its exit code."""
    environment = dict(os.environ, VIRTUAL_ENV=str(VENV), PATH=f"{SCRIPTS}{os.pathsep}{os.environ.get('PATH', '')}")
    environment.pop("PYTHONHOME", None)
    program = shutil.which(command[0], path=environment["PATH"])
    if program is None:
        print(f"tools/dev.py: no command {command[0]!r} in .venv or on the path", file=sys.stderr)
        return 127
    if os.name != "nt":
        # The command takes this process's place: signals, terminal and exit code are its own.
        os.execve(program, [command[0], *command[1:]], environment)
    child = subprocess.Popen([program, *command[1:]], env=environment)
    # Ctrl-C reaches both processes; the command decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return child.wait()


def main() -> int:
    if not is_current():
        status = make_environment()
        if status != 0:
            return status
    return run(sys.argv[1:]) if sys.argv[1:] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
