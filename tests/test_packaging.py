"""Pins, metadata and what wheels and sdists contain."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def release(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "tools" / "release.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


@pytest.fixture
def copied_root(root, packages, tmp_path):
    """The files a release touches, copied."""
    (tmp_path / "tools").mkdir()
    shutil.copy(root / "tools" / "release.py", tmp_path / "tools")
    shutil.copy(root / "VERSION", tmp_path)
    for package in packages:
        folder = tmp_path / "packages" / package.name
        folder.mkdir(parents=True)
        shutil.copy(package.folder / "pyproject.toml", folder)
    return tmp_path


def test_every_pin_equals_the_version(package, version):
    own = [Requirement(text) for text in package.metadata["dependencies"] if text.startswith("modalities-")]
    for requirements in package.metadata.get("optional-dependencies", {}).values():
        own += [Requirement(text) for text in requirements if text.startswith("modalities-")]
    assert {str(r.specifier) for r in own if r.name != package.name} <= {f"=={version}"}
    assert own or package.name == "modalities-core"


def test_release_check_passes_here(root):
    assert release(root, "--check").returncode == 0


def test_release_rewrites_version_and_all_pins(copied_root, version):
    pins_before = [p.read_text().count(f"=={version}") for p in sorted(copied_root.glob("packages/*/pyproject.toml"))]
    assert release(copied_root, "9.8.7rc1").returncode == 0
    assert (copied_root / "VERSION").read_text() == "9.8.7rc1\n"
    texts = [path.read_text() for path in sorted(copied_root.glob("packages/*/pyproject.toml"))]
    assert [text.count("==9.8.7rc1") for text in texts] == pins_before
    assert sum(pins_before) >= 7
    assert not any(f"=={version}" in text for text in texts)
    assert release(copied_root, "--check").returncode == 0


def test_release_check_finds_a_wrong_and_a_loose_pin(copied_root, version):
    path = copied_root / "packages" / "modalities-cli" / "pyproject.toml"
    text = path.read_text()
    path.write_text(text.replace(f"modalities-models=={version}", "modalities-models>=0.0.9"))
    done = release(copied_root, "--check")
    assert done.returncode == 1
    assert "modalities-models>=0.0.9" in done.stdout
    path.write_text(text.replace(f"modalities-models=={version}", "modalities-models"))
    assert release(copied_root, "--check").returncode == 1


@pytest.mark.parametrize("wrong", ["1", "v1.2.3", "1.2.3-rc1", "01.2.3", "1.2.3+local"])
def test_release_refuses_what_is_no_version(copied_root, version, wrong):
    assert release(copied_root, wrong).returncode == 2
    assert (copied_root / "VERSION").read_text().strip() == version


def test_every_package_carries_the_license(package, root):
    assert (package.folder / "LICENSE").read_bytes() == (root / "LICENSE").read_bytes()


def imported_distributions(package) -> dict[str, str]:
    """Distributions that the package's source imports anywhere, each with one file that does."""
    installed = packages_distributions()
    found: dict[str, str] = {}
    for path in package.sources():
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            for top in {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names):
                if top not in package.import_names:
                    name = installed.get(top, [top])[0]
                    found[canonicalize_name(name)] = str(path.relative_to(package.folder))
    return found


def test_every_import_is_a_declared_dependency(package):
    declared = list(package.metadata["dependencies"])
    for requirements in package.metadata.get("optional-dependencies", {}).values():
        declared += requirements
    names = {canonicalize_name(Requirement(text).name) for text in declared}
    missing = {name: path for name, path in imported_distributions(package).items() if name not in names}
    assert not missing, f"{package.name} imports what its pyproject.toml does not declare: {missing}"


def wheel_of(package, folder: Path) -> Path:
    (path,) = folder.glob(f"{package.name.replace('-', '_')}-*.whl")
    return path


def sdist_of(package, folder: Path) -> Path:
    (path,) = folder.glob(f"{package.name.replace('-', '_')}-*.tar.gz")
    return path


def wheel_contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist()}


def test_wheel_has_every_source_file_and_nothing_else(package, distributions, version):
    contents = wheel_contents(wheel_of(package, distributions))
    info = f"{package.name.replace('-', '_')}-{version}.dist-info/"
    files = {name for name in contents if not name.startswith(info)}
    assert files == {path.relative_to(package.folder / "src").as_posix() for path in package.sources()}
    assert {f"{name}/py.typed" for name in package.import_names} <= files
    assert f"\nVersion: {version}\n" in contents[info + "METADATA"].decode()
    assert info + "licenses/LICENSE" in contents
    for group in ("scripts", "entry-points"):
        assert group not in package.metadata or info + "entry_points.txt" in contents


def test_sdist_has_sources_tests_readme_and_license(package, distributions, version):
    top = f"{package.name.replace('-', '_')}-{version}/"
    with tarfile.open(sdist_of(package, distributions)) as sdist:
        names = {name.removeprefix(top) for name in sdist.getnames()}
    wanted = [*package.sources(), *package.folder.glob("tests/**/*.py")]
    assert {path.relative_to(package.folder).as_posix() for path in wanted} <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO"} <= names


def test_wheel_from_an_unpacked_sdist_is_the_same(package, distributions, build_project, tmp_path):
    with tarfile.open(sdist_of(package, distributions)) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (project,) = tmp_path.iterdir()
    build_project(project, tmp_path / "wheels", "wheel")
    rebuilt = wheel_of(package, tmp_path / "wheels")
    direct = wheel_of(package, distributions)
    assert rebuilt.name == direct.name
    assert wheel_contents(rebuilt) == wheel_contents(direct)


@pytest.mark.slow
def test_hatch_builds_all_packages_with_one_command(root, packages, version, environment, tmp_path):
    """``hatch build --all`` at the root; on a copy, so that the work tree gets no ``dist`` folder."""
    copy = tmp_path / "repository"
    copy.mkdir()
    for name in ("pyproject.toml", "VERSION", "constraints.txt", "LICENSE"):
        shutil.copy(root / name, copy)
    ignored = shutil.ignore_patterns("__pycache__", ".*", "dist", "build")
    shutil.copytree(root / "packages", copy / "packages", ignore=ignored)
    command = [sys.executable, "-m", "hatch", "--data-dir", str(tmp_path / "data"), "build", "--all"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    stems = [f"{package.name.replace('-', '_')}-{version}" for package in packages]
    expected = {f"{stem}{end}" for stem in stems for end in ("-py3-none-any.whl", ".tar.gz")}
    assert {path.name for path in (copy / "dist").iterdir() if path.suffix in (".whl", ".gz")} == expected
