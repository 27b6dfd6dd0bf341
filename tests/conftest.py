"""What the tests that span packages share: where things lie, and the built distributions."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Package:
    """One of the five packages: its folder and its parsed pyproject.toml."""

    folder: Path

    @property
    def metadata(self) -> dict:
        return tomllib.loads((self.folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def import_names(self) -> list[str]:
        return sorted(path.parent.name for path in self.folder.glob("src/*/__init__.py"))

    def sources(self) -> list[Path]:
        """Every file that is part of the package, without caches."""
        return sorted(p for p in self.folder.glob("src/**/*") if p.is_file() and "__pycache__" not in p.parts)


PACKAGES = [Package(path.parent) for path in sorted(ROOT.glob("packages/*/pyproject.toml"))]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the argument ``package`` runs once per package."""
    if "package" in metafunc.fixturenames:
        metafunc.parametrize("package", PACKAGES, ids=lambda package: package.name)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def packages() -> list[Package]:
    """The five packages."""
    return PACKAGES


@pytest.fixture(scope="session")
def version() -> str:
    """What VERSION says."""
    return (ROOT / "VERSION").read_text(encoding="utf-8").strip()


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist of every package."""
    folder = tmp_path_factory.mktemp("distributions")
    for package in PACKAGES:
        build(package.folder, folder, "sdist", "wheel")
    return folder


def build(project: Path, folder: Path, *targets: str) -> None:
    """Build ``project`` into ``folder`` with the build backend itself, in this environment."""
    chosen = [word for target in targets for word in ("--target", target)]
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder), *chosen]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=60, env=clean_environment())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment for a Python of its own: nothing here points it at this one's packages."""
    return clean_environment()


@pytest.fixture(scope="session")
def build_project():
    """Build a project folder: ``build_project(project, output_folder, *targets)``."""
    return build


def clean_environment() -> dict[str, str]:
    """This process's environment without what points Python at other places."""
    dropped = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTEST_ADDOPTS"}
    return {name: value for name, value in os.environ.items() if name not in dropped}
