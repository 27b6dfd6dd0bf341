"""The rules of the house, checked by the tools of the trade."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

LONGEST_FILE = 320
LONGEST = {"packages/modalities-core/src/modalities_core/interfaces.py": 480}
"""All seams stand in one file, to be read first."""


def passes(root: Path, name: str, *arguments: str) -> None:
    """Run a script of this environment at the root and fail with what it printed."""
    script = Path(sysconfig.get_path("scripts")) / name
    done = subprocess.run([str(script), *arguments], cwd=root, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]


def test_layers_and_cycles(root):
    passes(root, "lint-imports", "--no-logo", "--no-cache")


def test_lint(root):
    passes(root, "ruff", "check", "--no-cache", "--output-format", "concise")


def test_format(root):
    passes(root, "ruff", "format", "--check", "--no-cache", "--output-format", "concise")


def test_types(root):
    passes(root, "pyrefly", "check", "--output-format", "min-text")


BROKEN_TREES = {
    "siblings": {"modalities_data/a.py": "import modalities_models"},
    "upwards": {"modalities_core/a.py": "def late():\n    import modalities_cli"},
    "torch in core": {"modalities_core/a.py": "import torch"},
    "training in core": {"modalities_core/a.py": "import modalities_core.training"},
    "torch in data": {"modalities_data/a.py": "def late():\n    from torch import nn"},
    "loading in data": {"modalities_data/a.py": "from modalities_data import loading"},
    "cycle": {
        "modalities_models/a.py": "import modalities_models.b",
        "modalities_models/b.py": "from modalities_models.a import name",
    },
}


def lint_tree(root: Path, folder: Path, files: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Our import contracts on a small tree of the same packages, with ``files`` added."""
    tree = {f"modalities_{name}/__init__.py": "" for name in ("core", "data", "models", "parallel", "cli")}
    tree |= {
        f"{heavy}/__init__.py": "import torch" for heavy in ("modalities_core/training", "modalities_data/loading")
    }
    for name, text in (tree | files).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text + "\n")
    (folder / "pyproject.toml").write_text((root / "pyproject.toml").read_text(encoding="utf-8"))
    # The folder first on the path, so that its packages are read and not the installed ones.
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); from importlinter.cli import lint_imports_command as lint"
    command = [sys.executable, "-c", code + "; lint()", "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def test_import_contracts_hold_for_a_clean_tree(root, tmp_path):
    done = lint_tree(root, tmp_path, {})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", BROKEN_TREES)
def test_import_contracts_find_what_they_are_for(root, tmp_path, case):
    done = lint_tree(root, tmp_path, BROKEN_TREES[case])
    assert done.returncode == 1
    assert "BROKEN" in done.stdout


def python_files(root: Path) -> list[Path]:
    """Every Python file that users or developers run: packages, tools and examples, without tests."""
    folders = [*root.glob("packages/*/src"), root / "tools", root / "examples"]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def test_a_file_is_one_room(root):
    lengths = {str(path.relative_to(root)): len(path.read_text().splitlines()) for path in python_files(root)}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST.get(name, LONGEST_FILE)} == {}


def test_the_version_stands_once(root, version):
    """No source repeats the number that VERSION holds; it would be forgotten at the next release."""
    quoted = re.compile(rf"""["']v?{re.escape(version)}["']""")
    assert [str(p.relative_to(root)) for p in python_files(root) if quoted.search(p.read_text())] == []


def test_the_change_log_has_the_version(root, version):
    assert re.search(rf"^## \[{re.escape(version)}\]", (root / "CHANGELOG.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("folder", ["packages", "tools", "tests", "examples", "config_files", ".ci"])
def test_no_path_of_one_machine(root, folder):
    """No absolute path below somebody's home or work folder."""
    absolute = re.compile(r"(?<![\w.~}/-])/(?:home|Users|root|work)/\w")
    endings = {".py", ".md", ".toml", ".yaml", ".yml", ".sh"}
    files = [p for p in (root / folder).rglob("*") if p.is_file() and (p.suffix in endings or folder == ".ci")]
    found = [
        f"{path.relative_to(root)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if absolute.search(line)
    ]
    assert found == []
