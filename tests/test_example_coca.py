"""The example of CoCa, small: pictures from scans, training from its document, scores, captions and a drawing."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from modalities_cli.wiring import checked_graph
from modalities_core.errors import ConfigError, DataError
from modalities_data.image_text import open_images, read_captions, read_manifest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "coca"
CONFIG = EXAMPLE / "coca.yaml"
SMALL = [
    "trainer.batches.samples_per_step=32",
    "trainer.batches.micro_batch_size=32",
    "trainer.schedule={component: schedule.constant}",
    "trainer.log_every=1",
]


def script(name: str) -> ModuleType:
    """A module of the example."""
    spec = importlib.util.spec_from_file_location(f"coca_example_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's data, fewer pictures."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("coca") / "data"
    script("prepare").prepare(folder, pictures=400, held_out=40)
    return folder


def logged(folder: Path, event: str) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == event]


def test_pictures_show_what_their_captions_say(data: Path) -> None:
    from sklearn.datasets import load_digits

    prepare = script("prepare")
    digits = load_digits()
    known = {name: digits.images[part].reshape(-1, 64) for name, part in
             {"train": slice(None, -360), "held_out": slice(-360, None)}.items()}  # fmt: skip
    for name, scans in known.items():
        labels = digits.target[:-360] if name == "train" else digits.target[-360:]
        manifest = read_manifest(data / name)
        images = open_images(data / name, manifest).astype(float)
        for image, caption in zip(images[:25], read_captions(data / name, manifest)[:25], strict=True):
            words = caption.text.replace("left of", "left").split()
            halves = (image[:, :8], image[:, 8:]) if words[3] == "left" else (image[:8], image[8:])
            for half, colour, digit in zip(halves, (words[1], words[5]), (words[2], words[6]), strict=True):
                # Undo the tint, take the scan out of its half, and look for it among those of this part of the data.
                level = (half.max(-1) / max(prepare.COLOURS[colour]) * 16).round()
                tinted = np.outer(level / 16, prepare.COLOURS[colour]).reshape(half.shape)
                assert np.abs(tinted - half).max() <= 8, "another colour"
                along = level if words[3] == "left" else level.T
                windows = [along[start : start + 8] for start in range(9)]
                flat = np.array([w if words[3] == "left" else w.T for w in windows]).reshape(9, 64)
                whole = flat[flat.sum(1) == level.sum()]
                distances = np.abs(whole[:, None] - scans[None]).sum(-1)
                assert distances.min() == 0
                assert prepare.DIGITS[labels[distances.min(0).argmin()]] == digit


def test_held_out_scans_and_half_of_the_captions_are_new(data: Path) -> None:
    train, held_out = (
        [caption.text for caption in read_captions(data / name, read_manifest(data / name))]
        for name in ("train", "held_out")
    )
    assert len(held_out) == len(set(held_out)) == 40
    prepare = script("prepare")
    known, never = (set(map(prepare.caption, part)) for part in prepare.scenes(0))
    assert not known & never and len(known | never) == 3200
    assert set(train) <= known
    assert sum(caption in never for caption in held_out) == 20


def test_the_document_is_valid_and_its_parts_fit(data: Path) -> None:
    options = [f"settings.data={data}"]
    with torch.device("meta"):
        trainer = checked_graph(CONFIG, options).build("trainer")
    assert trainer.batches.image_shape == trainer.executor.model.image_shape == (16, 16, 3)
    with torch.device("meta"), pytest.raises(ConfigError, match="looks at images of 20 x 20 x 3"):
        checked_graph(CONFIG, [*options, "model.model.vision.image_size=20"]).build("trainer")
    with torch.device("meta"), pytest.raises(DataError, match=r"longest caption has \d tokens"):
        checked_graph(CONFIG, [*options, "settings.sequence_length=4"]).build("trainer")


@pytest.mark.slow
def test_the_example_trains_finds_and_describes(data: Path, modalities, tmp_path: Path) -> None:
    run, picture = tmp_path / "run", tmp_path / "coca.png"
    done = modalities("run", CONFIG, f"settings.data={data}", "settings.steps=40", *SMALL, "--folder", run)
    assert done.returncode == 0, done.stderr
    losses = [record["loss"] for record in logged(run, "step_logged")]
    # At the start nothing is known: twice the logarithm of the vocabulary and once that of the micro batch.
    assert losses[0] == pytest.approx(2 * math.log(320) + math.log(32), rel=0.1)
    assert losses[-1] < losses[0] - 5
    assert [record["step"] for record in logged(run, "evaluated")] == [0, 40]
    shown = subprocess.run(
        [sys.executable, EXAMPLE / "show.py", run, "--data", data, "--picture", picture, "--json"],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    scores = json.loads(shown.stdout.splitlines()[-1])
    assert scores["recall@1 chance"] == 1 / 40
    assert scores["recall@5 text of image"] > 2 * scores["recall@5 chance"]
    assert scores["recall@5 image of text"] > 2 * scores["recall@5 chance"]
    assert picture.stat().st_size > 20_000


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns_and_continue_on_one(data: Path, torchrun, tmp_path: Path) -> None:
    options = [f"settings.data={data}", *SMALL, "trainer.checkpoints.every=5"]
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    for ranks, folder, steps in ((1, straight, 10), (2, moved, 5), (1, moved, 10)):
        # The same 32 pairs are compared with each other, on however many ranks.
        more = [f"settings.steps={steps}", f"trainer.batches.micro_batch_size={32 // ranks}"]
        done = torchrun(ranks, "run", CONFIG, *options, *more, "--folder", folder)
        assert done.returncode == 0, done.stderr
    one, two = ([record["loss"] for record in logged(folder, "step_logged")] for folder in (straight, moved))
    assert one == pytest.approx(two, rel=1e-4) and len(one) == 10
    ends = [logged(folder, "evaluated")[-1]["loss"] for folder in (straight, moved)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)
