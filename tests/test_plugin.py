"""The example plugin, installed as a third party would, and the example of library usage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from parallel_matrix_parts import MIDDLE, NEAR, Launcher, farthest, logged, overrides

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "config_files" / "config_lorem_ipsum.yaml"
MODEL = ROOT / "examples" / "plugin" / "cosine_decoder.yaml"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the plugin is installed, in a folder of its own."""
    target = tmp_path_factory.mktemp("plugin")
    source = ROOT / "examples" / "plugin"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    done = subprocess.run([*pip, str(target), str(source)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}


def test_component_and_command_of_a_plugin(plugin: dict[str, str], modalities, tmp_path: Path) -> None:
    listed = modalities("components", "--kind", "schedule", env=plugin)
    assert "schedule.inverse_square_root" in listed.stdout
    assert "modalities-example-plugin" in listed.stdout
    schedule = "trainer.schedule={component: schedule.inverse_square_root, warmup_steps: 2}"
    options = [schedule, "settings.steps=4", "trainer.log_every=1"]
    done = modalities("run", CONFIG, "--folder", tmp_path / "run", *options, env=plugin)
    assert done.returncode == 0, done.stderr
    rates = [r["learning_rate"] for r in records(tmp_path / "run") if r["event"] == "step_logged"]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3 * (3 / 2) ** -0.5, 1e-3 * 2**-0.5])
    assert "loss-curve" in modalities("--help", env=plugin).stdout
    drawn = modalities("loss-curve", tmp_path / "run", env=plugin)
    assert drawn.returncode == 0, drawn.stderr
    assert "nats per token" in drawn.stdout


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def launcher(plugin: dict[str, str]) -> Iterator[Launcher]:
    launcher = Launcher(plugin)
    yield launcher
    launcher.close()


@pytest.fixture(scope="module")
def alone(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the plugin's model, trained by one process."""
    folder = tmp_path_factory.mktemp("model") / "alone"
    launcher.run("", folder, [], config=MODEL, weights=folder.with_name("alone.npz"))
    return folder


@pytest.mark.parametrize(
    ("mesh", "then"),
    [
        ("dp_shard 2", "tp 2"),
        ("tp 2", "pp 2"),
        ("pp 2", "dp_shard 2"),
        ("cp 2", ""),
        ("tp 2 dp_shard 2", "cp 2 tp 2"),
        ("pp 2 tp 2", "cp 2 dp_shard 2"),
    ],
)
def test_a_model_that_only_declares_its_plan_learns_on_any_mesh(
    mesh: str, then: str, launcher: Launcher, alone: Path, tmp_path: Path
) -> None:
    assert logged(alone)["loss", 10] < logged(alone)["loss", 1] - 0.2, "nothing is learned"
    common = {"config": MODEL, "reference": alone.with_name("alone.npz")}
    results = launcher.run(mesh, tmp_path / "whole", overrides(mesh), **common)
    assert max(farthest(results, tmp_path / "whole", alone, first=0)) <= NEAR
    middle = tmp_path / "whole" / MIDDLE
    results = launcher.run(then, tmp_path / "then", overrides(then), copy=middle, **common)
    assert max(farthest(results, tmp_path / "then", alone, first=6)) <= NEAR


def test_the_model_knows_no_package_but_the_interfaces() -> None:
    source = (MODEL.parent / "src" / "modalities_example_plugin" / "model.py").read_text()
    imported = {line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert {name for name in imported if name.startswith("modalities")} <= {
        "modalities_core.errors",
        "modalities_core.interfaces",
    }


def test_plugin_is_not_imported_unless_named(plugin: dict[str, str]) -> None:
    code = "import sys; from modalities_core.registry import registry; list(registry()); "
    code += "sys.exit('modalities_example_plugin.schedule' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=plugin, timeout=60).returncode == 0


def test_library_usage(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "library_usage.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "trained 20 steps" in done.stdout
