"""tools/dev.py: when it makes the environment, and how it runs a command in it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import venv
from pathlib import Path

import pytest


@pytest.fixture
def repository(root, tmp_path) -> Path:
    """A small repository with tools/dev.py, one package and a development group."""
    folder = tmp_path / "a repository"
    (folder / "tools").mkdir(parents=True)
    shutil.copy(root / "tools" / "dev.py", folder / "tools")
    (folder / "VERSION").write_text("0.1.0\n")
    (folder / "constraints.txt").write_text("")
    (folder / "pyproject.toml").write_text('[dependency-groups]\ndev = ["pytest"]\n')
    (folder / "packages" / "one").mkdir(parents=True)
    (folder / "packages" / "one" / "pyproject.toml").write_text('[project]\nname = "one"\nversion = "1"\n')
    return folder


def load(repository: Path):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("dev", repository / "tools" / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def made(repository) -> Path:
    """The repository with a finished environment, as far as tools/dev.py can tell."""
    venv.create(repository / ".venv", with_pip=False)
    dev = load(repository)
    dev.STAMP.write_text(dev.fingerprint())
    return repository


def run(repository: Path, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(repository / "tools" / "dev.py"), *command]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=60)


def test_runs_in_the_environment_from_any_folder_with_its_exit_code(made, tmp_path):
    code = "import sys, os; print(sys.prefix, os.getcwd(), sys.argv[1:]); sys.exit(7)"
    done = run(made, "python", "-c", code, "a b", "--flag", cwd=tmp_path)
    assert done.returncode == 7
    assert done.stdout.strip() == f"{made / '.venv'} {tmp_path} ['a b', '--flag']"
    assert done.stderr == ""


def test_unknown_command(made):
    done = run(made, "no-such-command")
    assert done.returncode == 127
    assert "no-such-command" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_interrupt_reaches_the_command(made):
    code = (
        "import sys, time\n"
        "try:\n    print('ready', flush=True); time.sleep(30)\n"
        "except KeyboardInterrupt:\n    sys.exit(42)\n"
    )
    words = [sys.executable, str(made / "tools" / "dev.py"), "python", "-c", code]
    # Whoever runs the tests in the background of a shell has SIGINT ignored, and children inherit that.
    restored = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, **restored) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 42


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("VERSION", "0.2.0\n"),
        ("constraints.txt", "torch==2.11.0\n"),
        ("packages/one/pyproject.toml", '[project]\nname = "one"\nversion = "2"\n'),
        ("pyproject.toml", '[dependency-groups]\ndev = ["pytest", "ruff"]\n'),
    ],
)
def test_stale_when_what_is_installed_changes(made, name, text):
    assert load(made).is_current()
    (made / name).write_text(text)
    assert not load(made).is_current()


def test_not_stale_when_a_tool_setting_changes(made):
    path = made / "pyproject.toml"
    path.write_text(path.read_text() + "\n[tool.ruff]\nline-length = 100\n")
    assert load(made).is_current()


def test_stale_when_moved(made):
    moved = made.with_name("elsewhere")
    made.rename(moved)
    assert not load(moved).is_current()


def test_a_failed_install_is_no_environment(repository):
    """pip is asked for a folder that is no package: it fails without a network."""
    (repository / "packages" / "one" / "pyproject.toml").write_text("this is not TOML [")
    done = run(repository, "python", "--version")
    assert done.returncode != 0
    assert "pip could not install" in done.stderr
    assert not load(repository).is_current()
    assert not (repository / ".venv" / "dev.stamp").exists()
