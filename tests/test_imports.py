"""Light modules stay light: no torch where the design says so, and help in half a second."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

HELP_CPU_SECONDS = 0.5
# The packages that work without torch, and the subpackages of theirs that may need it.
LIGHT = {"modalities_core": "modalities_core.training", "modalities_data": "modalities_data.loading"}
# The command line loads torch with the first command that needs it, not before.
LIGHT_MODULES = ["modalities_cli", "modalities_cli.__main__"]

# Runs in a process of its own: an import of torch, by whatever path, is an error there.
BLOCKED = """
import importlib, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchvision", "transformers", "flash_attn"}:
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, NoTorch())
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except BaseException as error:
        sys.exit(f"{name}: {type(error).__name__}: {error}")
assert "torch" not in sys.modules
"""


def light_modules() -> list[str]:
    """Names of all modules that must import without torch."""
    names = list(LIGHT_MODULES)
    for package, heavy in LIGHT.items():
        path = importlib.import_module(package).__path__
        found = [module.name for module in pkgutil.walk_packages(path, package + ".", onerror=lambda name: None)]
        names += [package, *(name for name in found if not (name + ".").startswith(heavy + "."))]
    return names


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_light_modules_import_together_without_torch():
    names = light_modules()
    assert {"modalities_core.interfaces", "modalities_core.registry", "modalities_data.__main__"} <= set(names)
    done = run_python(BLOCKED, *names)
    assert done.returncode == 0, done.stderr


def test_the_block_works():
    done = run_python(BLOCKED, "torch")
    assert done.returncode != 0
    assert "blocked: torch" in done.stderr


def test_training_and_loading_are_where_torch_is():
    """The heavy subpackages exist and do need torch: otherwise the exception above is too wide."""
    for heavy in LIGHT.values():
        path = importlib.import_module(heavy).__path__
        names = [module.name for module in pkgutil.iter_modules(path, heavy + ".")]
        assert any(run_python(BLOCKED, name).returncode != 0 for name in names), heavy


def scripts() -> Path:
    return Path(sysconfig.get_path("scripts"))


def cpu_seconds(command: list[str]) -> float:
    """User and system time of one run of ``command``."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    error = process.stderr.read().decode()
    process.stderr.close()
    assert process.returncode == 0, error
    return usage.ru_utime + usage.ru_stime


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs wait4")
@pytest.mark.parametrize("script", ["modalities", "modalities-data"])
def test_help_takes_less_than_half_a_second_of_cpu(script):
    fastest = min(cpu_seconds([str(scripts() / script), "--help"]) for _ in range(3))
    assert fastest < HELP_CPU_SECONDS


@pytest.mark.parametrize("module", ["modalities_cli.__main__", "modalities_data.__main__"])
def test_help_loads_no_torch(module):
    code = (
        "import sys, importlib\n"
        "sys.argv[1:] = ['--help']\n"
        f"main = importlib.import_module({module!r}).main\n"
        "try:\n    main()\nexcept SystemExit as exit:\n    assert not exit.code, exit.code\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {sorted(heavy)}' if heavy else 0)\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
