"""What holds for all trackers: a full disk, a package that is missing, and light imports."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from sink_parts import python, survive

from modalities_core.errors import ConfigError
from modalities_core.sinks import extras


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits of resources are a matter of POSIX")
@pytest.mark.parametrize("kind", ["tensorboard", "tensorboard-elsewhere", "wandb", "mlflow-store"])
def test_a_full_disk(tmp_path, kind):
    pytest.importorskip(kind.partition("-")[0])
    warning = survive(tmp_path, kind, 12_000, WANDB_MODE="offline")
    assert "run goes on" in warning or "is the disk full" in warning


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "mlflow"])
def test_a_missing_package_is_named_with_the_line_that_installs_it(name, monkeypatch):
    from modalities_core.registry import registry

    monkeypatch.setattr(extras, "find_spec", lambda module: None)
    with pytest.raises(ConfigError, match=f"sink.{name} needs the package") as caught:
        registry().entry(f"sink.{name}").load()()
    assert caught.value.hint == f'pip install "modalities-core[{name}]"'


def test_an_old_package_is_refused(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda module: True)
    monkeypatch.setattr(extras, "version", lambda name: "0.9.1")
    with pytest.raises(ConfigError, match=r"needs wandb 0\.31 or newer, here is 0\.9"):
        extras.require("wandb", "wandb", (0, 31))


def test_sinks_of_trackers_are_on_threads_and_load_nothing_before_they_start():
    code = "import sys; from modalities_core.sinks.wandb import wandb; from modalities_core.sinks.mlflow import mlflow;"
    code += "from modalities_core.sinks.tensorboard import tensorboard; wandb(); mlflow(); tensorboard();"
    code += "sys.exit(any(name in sys.modules for name in ('wandb', 'mlflow', 'tensorboard', 'torch')))"
    for name in ("wandb", "mlflow", "tensorboard"):
        pytest.importorskip(name)
    assert python(code, "", Path.cwd()).returncode == 0


def test_a_fresh_run_is_another_run_to_every_tracker(tmp_path):
    from modalities_core.sinks.wandb import run_id
    from modalities_core.training.resume import set_run_aside
    from modalities_core.training.world import Alone

    first = run_id(tmp_path)
    assert run_id(tmp_path) == first
    (tmp_path / "mlflow.json").write_text("{}")
    (tmp_path / "tensorboard").mkdir()
    set_run_aside(tmp_path, Alone("cpu"), fresh=False)
    assert run_id(tmp_path) == first
    set_run_aside(tmp_path, Alone("cpu"), fresh=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["previous-1"]
    assert sorted(path.name for path in (tmp_path / "previous-1").iterdir()) == ["mlflow.json", "tensorboard", "wandb"]
    assert run_id(tmp_path) != first
