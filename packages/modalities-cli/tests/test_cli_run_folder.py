"""What a run's folder says about how it was made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modalities_cli.run_folder import config_hash, describe
from modalities_core.config.document import load

TEXT = "version: 1\nsettings: {n: 1}\ntrainer: {component: a.b, n: '${settings.n}', who: '${env:USER}'}\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "c.yaml").write_text(TEXT)
    return tmp_path / "c.yaml"


def test_the_document_stands_there_as_given_and_as_used(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["modalities", "run", "c.yaml", "sink.api_key=hunter2", "settings.n=2"])
    monkeypatch.setenv("USER", "somebody-secret")
    folder = config.parent / "run"
    folder.mkdir()
    describe(folder, load(config, ["settings.n=2"]), ranks=3)
    assert (folder / "config.yaml").read_text() == TEXT
    again = load(folder / "config.resolved.yaml")
    assert again.tree["settings"] == {"n": 2}
    assert again.tree["trainer"]["n"] == "${settings.n}"
    assert again.folder == config.parent
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["command"][-2:] == ["sink.api_key=***", "settings.n=2"]
    assert (manifest["ranks"], manifest["overrides"]) == (3, ["settings.n=2"])
    assert manifest["packages"]["modalities-cli"]
    written = "".join(path.read_text() for path in folder.iterdir())
    assert "hunter2" not in written
    assert "somebody-secret" not in (folder / "config.resolved.yaml").read_text()


def test_the_hash_is_of_the_content_not_of_the_place(config: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "d.yaml").write_text("# a comment\n" + TEXT)
    assert config_hash(load(config)) == config_hash(load(other / "d.yaml"))
    assert config_hash(load(config)) != config_hash(load(config, ["settings.n=2"]))
