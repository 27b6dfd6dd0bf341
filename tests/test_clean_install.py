"""Each package alone in an environment of its own: what it declares is all it needs.

Environments with torch are copies of one, made of hard links, so that torch is unpacked once. All wheels are fetched
once, into one folder; after that pip installs from there and asks no index.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# With the bytecode that pip compiles.
LIGHT_MEGABYTES = 200

IMPORT_ALL = """
import importlib, pkgutil, sys
for package in sys.argv[1:]:
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        importlib.import_module(module.name)
"""

# The whole suite has run every case already; here only what the code imports is in question.
ONE_OF_EACH = """
def pytest_collection_modifyitems(config, items):
    first = {(item.path, item.cls, item.originalname): item for item in reversed(items)}
    left_out = [item for item in items if item is not first[item.path, item.cls, item.originalname]]
    items[:] = [item for item in items if item is first[item.path, item.cls, item.originalname]]
    config.hook.pytest_deselected(items=left_out)
"""


class Environment:
    """A virtual environment in ``folder`` that pip fills from the folder ``wheels``."""

    def __init__(self, folder: Path, root: Path, wheels: Path, variables: dict[str, str]) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.root = root
        self.wheels = wheels
        self.variables = {**variables, "VIRTUAL_ENV": str(folder)}
        self.variables["PATH"] = f"{folder / 'bin'}{os.pathsep}{variables.get('PATH', '')}"

    def run(self, *command: str | Path, cwd: Path | None = None, seconds: float = 300, **variables: str) -> str:
        """What ``command`` prints; a failure shows it all."""
        words, env = [str(word) for word in command], self.variables | variables
        done = subprocess.run(words, cwd=cwd or self.folder, env=env, capture_output=True, text=True, timeout=seconds)
        assert done.returncode == 0, f"{words}\n{done.stdout[-12000:]}{done.stderr[-6000:]}"
        return done.stdout

    def install(self, *requirements: str, compiled: bool = True) -> None:
        """Install by requirement, or by folder relative to the root."""
        options = ["--quiet", "--no-index", "--find-links", str(self.wheels)]
        options += [] if compiled else ["--no-compile"]
        self.run(self.python, "-m", "pip", "install", *options, *requirements, cwd=self.root)

    def distributions(self) -> set[str]:
        listed = json.loads(self.run(self.python, "-m", "pip", "list", "--format", "json"))
        return {canonicalize_name(entry["name"]) for entry in listed}

    def copied(self, folder: Path) -> Environment:
        """The same environment at ``folder``: its Python finds its own packages by where it is."""
        shutil.copytree(self.folder, folder, symlinks=True, copy_function=link)
        return Environment(folder, self.root, self.wheels, self.variables)


def link(source: str, target: str, **options: object) -> None:
    """A hard link instead of a copy; pip replaces files and never writes into them. Links stay links."""
    os.link(source, target, follow_symlinks=False)


@pytest.fixture(scope="module")
def wheels(root, packages, distributions, environment, tmp_path_factory) -> Path:
    """Our wheels, everything they declare under the repository's constraints, and the test tools."""
    folder = tmp_path_factory.mktemp("wheels")
    ours = [f"{package.name}{extras_of(package)}" for package in packages]
    tools = sorted({text for package in packages for text in test_tools_of(package, root)})
    build_backends = ["hatchling", "editables"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--constraint", root / "constraints.txt"]
    command += ["--dest", folder, "--find-links", distributions, *ours, *tools, *build_backends]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-8000:]
    return folder


@pytest.fixture(scope="module")
def bare(root, wheels, environment, tmp_path_factory) -> Environment:
    """An environment with pip only."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, with_pip=True)
    return Environment(folder, root, wheels, environment)


@pytest.fixture(scope="module")
def with_torch(bare, tmp_path_factory) -> Environment:
    """An environment with torch and what torch declares; only what an import loads is compiled, once for all copies."""
    made = bare.copied(tmp_path_factory.mktemp("torch") / "venv")
    made.install("torch", compiled=False)
    made.run(made.python, "-c", "import torch, torch._dynamo, torch.distributed.fsdp, torch.distributed.checkpoint")
    return made


def extras_of(package) -> str:
    """The extra that its tests need, for a requirement."""
    return "[torch]" if "torch" in package.metadata.get("optional-dependencies", {}) else ""


def test_tools_of(package, root) -> list[str]:
    """pytest, and the development requirements that the package's tests import."""
    installed = packages_distributions()
    imported = {"pytest", "pytest-timeout"}
    for path in package.folder.glob("tests/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            for module in modules:
                imported.update(installed.get(module.partition(".")[0], []))
    development = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]["dev"]
    names = {canonicalize_name(name) for name in imported}
    return [text for text in development if canonicalize_name(Requirement(text).name) in names]


test_tools_of.__test__ = False


def unpacked(package, distributions: Path, folder: Path) -> Path:
    """The package's sdist, unpacked."""
    (archive,) = distributions.glob(f"{package.name.replace('-', '_')}-*.tar.gz")
    with tarfile.open(archive) as sdist:
        sdist.extractall(folder, filter="data")
    (project,) = folder.iterdir()
    return project


def run_tests(environment: Environment, project: Path) -> str:
    """The quick tests of an unpacked sdist, the first case of each, with the repository's settings, away from it."""
    plugins = project.parent / "plugins"
    plugins.mkdir()
    (plugins / "one_of_each.py").write_text(ONE_OF_EACH, encoding="utf-8")
    settings = ["-c", environment.root / "pyproject.toml", "--rootdir", project, "-p", "no:cacheprovider", "-q"]
    command = [environment.python, "-m", "pytest", *settings, "-p", "one_of_each", project / "tests"]
    return environment.run(*command, cwd=project, seconds=400, PYTHONPATH=str(plugins))


def test_package_alone_passes_its_tests(package, root, with_torch, distributions, tmp_path):
    environment = with_torch.copied(tmp_path / "venv")
    environment.install(f"{package.name}{extras_of(package)}", compiled=False)
    environment.run(environment.python, "-c", IMPORT_ALL, *package.import_names)
    declared = package.metadata["dependencies"]
    siblings = {canonicalize_name(Requirement(text).name) for text in declared if text.startswith("modalities-")}
    ours = {name for name in environment.distributions() if name.startswith("modalities-")}
    assert siblings | {package.name} <= ours
    if package.name != "modalities-cli":
        assert ours == {package.name, "modalities-core"}
    environment.install(*test_tools_of(package, root), compiled=False)
    printed = run_tests(environment, unpacked(package, distributions, tmp_path / "sdist"))
    assert " passed" in printed.splitlines()[-1]


def size_of(environment: Environment) -> float:
    """Megabytes in site-packages, without pip and setuptools."""
    (site,) = environment.folder.glob("lib/python*/site-packages")
    tools = ("pip", "setuptools", "_distutils_hack", "pkg_resources", "distutils-precedence.pth")
    counted = [p for p in site.rglob("*") if not p.relative_to(site).parts[0].startswith(tools)]
    return sum(path.stat().st_size for path in counted if path.is_file()) / 1e6


def stated(readme: Path) -> tuple[float, int]:
    """What the README of modalities-data says about its size in MB, and how many distributions that is."""
    found = re.search(r"(\d+) MB on Linux, (\d+) distributions", readme.read_text(encoding="utf-8"))
    assert found is not None
    return float(found[1]), int(found[2])


def test_core_and_data_install_without_torch_and_pack(root, packages, bare, distributions, tmp_path):
    environment = bare.copied(tmp_path / "venv")
    environment.install("./packages/modalities-core", "./packages/modalities-data")
    assert "torch" not in environment.distributions()
    size, count = size_of(environment), len(environment.distributions() - {"pip", "setuptools"})
    stated_size, stated_count = stated(root / "packages/modalities-data/README.md")
    # What it depends on has other sizes on another day.
    assert abs(size - stated_size) < 0.1 * stated_size and abs(count - stated_count) <= 4, (size, count)
    assert size < LIGHT_MEGABYTES

    documents = [{"text": f"Document {number}: the quick brown fox, número {number}."} for number in range(200)]
    source = tmp_path / "documents.jsonl"
    source.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    packed = tmp_path / "packed"
    environment.run("modalities-data", "pack", source, packed, "--tokenizer", "bytes", cwd=tmp_path)
    manifest = json.loads((packed / "manifest.json").read_text(encoding="utf-8"))
    # One token per byte of UTF-8, and one that ends each document; two bytes per token in the file.
    tokens = sum(len(document["text"].encode()) + 1 for document in documents)
    assert sum(shard["tokens"] for shard in manifest["shards"]) == tokens
    assert sum(path.stat().st_size for path in packed.glob("*.bin")) == 2 * tokens
    environment.run("modalities-data", "verify", packed, cwd=tmp_path)

    # The tests of modalities-data that need no torch run here too; the others skip themselves.
    (data,) = [package for package in packages if package.name == "modalities-data"]
    environment.install(*[text for text in test_tools_of(data, root) if not text.startswith(("transformers", "torch"))])
    assert "torch" not in environment.distributions()
    printed = run_tests(environment, unpacked(data, distributions, tmp_path / "sdist"))
    assert " passed" in printed.splitlines()[-1]


def test_core_works_without_any_extra(bare, tmp_path):
    """The interfaces and the configuration language need neither torch nor numpy."""
    environment = bare.copied(tmp_path / "venv")
    environment.install("modalities-core")
    assert not environment.distributions() & {"torch", "numpy"}
    code = (
        "import importlib, pkgutil, modalities_core as core\n"
        "for module in pkgutil.walk_packages(core.__path__, 'modalities_core.'):\n"
        "    if not module.name.startswith('modalities_core.training'):\n"
        "        importlib.import_module(module.name)\n"
    )
    environment.run(environment.python, "-c", code)
