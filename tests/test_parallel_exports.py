"""A checkpoint that several ranks wrote, as one process reads it: whole, and as a folder of Hugging Face's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from parallel_matrix_parts import NEAR, Launcher, overrides

from modalities_core.training.checkpointing import load_checkpoint
from modalities_core.training.manifest import read_manifest
from modalities_core.training.optim import adamw
from modalities_core.training.parameters import tensor_layout
from modalities_models.decoder import decoder
from modalities_models.huggingface.exporting import export
from modalities_models.huggingface.verifying import exported_decoder, verify
from modalities_parallel.checkpoint.sharded import Sharded

CONFIG = Path(__file__).with_name("parallel_matrix.yaml")
FAMILY = ["decoder.key_value_heads=2"]
LAST = "checkpoints/step-00000010"


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()


def whole_model():
    given = yaml.safe_load(CONFIG.read_text())["decoder"]
    given = {name: value for name, value in given.items() if isinstance(value, int)}
    return decoder(**given, sequence_length=16, key_value_heads=2)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tp 2", "pp 2", "cp 2", "tp 2 dp_shard 2", "pp 2 tp 2"])
def test_one_process_reads_what_a_mesh_wrote(mesh: str, launcher: Launcher, tmp_path: Path) -> None:
    launcher.run("", tmp_path / "alone", FAMILY, weights=tmp_path / "alone.npz")
    launcher.run(mesh, tmp_path / "mesh", [*FAMILY, *overrides(mesh)])
    folder = tmp_path / "mesh" / LAST
    expected = np.load(tmp_path / "alone.npz")
    model = whole_model()
    manifest = read_manifest(folder)
    assert {name: (record.shape, record.dtype) for name, record in manifest.tensors.items()} == tensor_layout(model)
    read = Sharded().model_reader(folder)
    for name in expected.files:
        np.testing.assert_allclose(read(name).numpy(), expected[name], atol=NEAR * np.abs(expected[name]).max())
    # The optimizer's state as well: the very tensors that one process saves.
    layout, alone = Sharded().tensors(folder), Sharded().tensors(tmp_path / "alone" / LAST)
    assert layout == alone
    optimizer = adamw(model, lr=1e-2)
    load_checkpoint(folder, Sharded(), model, optimizer)
    other = whole_model()
    its_optimizer = adamw(other, lr=1e-2)
    load_checkpoint(tmp_path / "alone" / LAST, Sharded(), other, its_optimizer)
    for one, another in zip(model.parameters(), other.parameters(), strict=True):
        mine, theirs = optimizer.state[one], its_optimizer.state[another]
        assert mine.keys() == theirs.keys()
        for key in mine:
            off = (mine[key].float() - theirs[key].float()).abs().max() / theirs[key].float().abs().max()
            assert off < 100 * NEAR, key


@pytest.mark.slow
def test_it_is_exported_for_transformers(launcher: Launcher, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    launcher.run("pp 2", tmp_path / "mesh", [*FAMILY, *overrides("pp 2")])
    read = Sharded().model_reader(tmp_path / "mesh" / LAST)
    architecture = whole_model().architecture
    (tmp_path / "exported").mkdir()
    export(tmp_path / "exported", architecture, read)
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["vocab_size"] == 97
    agreement = verify(exported_decoder(tmp_path / "exported", architecture, read), tmp_path / "exported")
    assert agreement.difference < 1e-4 * agreement.scale
