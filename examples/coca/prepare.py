"""Pictures of two handwritten digits and what they show, from scikit-learn's 1,797 real scans of 8 x 8 pixels.

    python examples/coca/prepare.py runs/coca-data

Each picture has two scans, tinted, side by side or one above the other; its caption says which: "a red three left of
a blue seven". The scans of the held-out pictures never occur in training, and half of their captions do not either.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from modalities_data.image_text import write_image_text
from modalities_data.tokenizers.train import train_tokenizer

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {"red": (255, 70, 70), "green": (80, 230, 80), "blue": (90, 140, 255), "yellow": (255, 220, 60)}
RELATIONS = ("left of", "above")
SIDE = 16
"""Pixels of a picture; a scan has half."""
HELD_OUT_SCANS = 360
"""The last ones, mostly of writers who do not occur among the others."""
NEVER_IN_TRAINING = 320
"""Of the 3,200 captions."""

Scene = tuple[str, int, str, str, int]
"""Colour and digit, relation, colour and digit; the left or upper one is named first."""


def caption(scene: Scene) -> str:
    """What a picture shows, in words."""
    colour, digit, relation, other_colour, other_digit = scene
    return f"a {colour} {DIGITS[digit]} {relation} a {other_colour} {DIGITS[other_digit]}"


def scenes(seed: int) -> tuple[list[Scene], list[Scene]]:
    """All scenes in random order: those of training, and those that never occur in it."""
    one = list(itertools.product(COLOURS, range(10)))
    every: list[Scene] = [(*first, relation, *second) for first in one for relation in RELATIONS for second in one]
    order = np.random.default_rng(seed).permutation(len(every))
    shuffled = [every[place] for place in order]
    return shuffled[NEVER_IN_TRAINING:], shuffled[:NEVER_IN_TRAINING]


def picture(scene: Scene, scans: dict[int, np.ndarray], random: np.random.Generator) -> np.ndarray:
    """(SIDE, SIDE, 3) uint8: a random scan of each digit, each shifted in the free direction."""
    canvas = np.zeros((SIDE, SIDE, 3))
    half = SIDE // 2
    base = int(random.integers(2))
    for place, (colour, digit) in enumerate((scene[:2], scene[3:])):
        # At most half a scan apart across: corner to corner, left of and above would look the same.
        along, across = place * half, (base + int(random.integers(2))) * half // 2
        top, left = (across, along) if scene[2] == "left of" else (along, across)
        scan = scans[digit][random.integers(len(scans[digit]))] / 16.0
        canvas[top : top + half, left : left + half] += scan[..., None] * np.array(COLOURS[colour])
    return canvas.round().astype(np.uint8)


def pairs(chosen: list[Scene], scans: dict[int, np.ndarray], seed: int) -> Iterator[tuple[np.ndarray, str | list[str]]]:
    """A picture and its caption for each scene."""
    random = np.random.default_rng(seed)
    for scene in chosen:
        yield picture(scene, scans, random), caption(scene)


def prepare(folder: Path, pictures: int, held_out: int, seed: int = 0) -> None:
    """Write train, held_out and tokenizer.json to ``folder``."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("this needs scikit-learn: pip install -r examples/coca/requirements.txt") from None
    digits = load_digits()
    parts = {"train": slice(None, -HELD_OUT_SCANS), "held_out": slice(-HELD_OUT_SCANS, None)}
    scans = {
        name: {digit: digits.images[part][digits.target[part] == digit] for digit in range(10)}
        for name, part in parts.items()
    }
    known, never = scenes(seed)
    train = [known[place] for place in np.random.default_rng(seed + 1).integers(len(known), size=pictures)]
    new = min(held_out // 2, len(never))
    folder.mkdir(parents=True, exist_ok=True)
    write_image_text(folder / "train", pairs(train, scans["train"], seed + 2), overwrite=True)
    # Every held-out caption once, the ones that never occur in training first.
    both = [*never[:new], *known[: held_out - new]]
    write_image_text(folder / "held_out", pairs(both, scans["held_out"], seed + 3), overwrite=True)
    size = train_tokenizer((caption(scene) for scene in train), folder / "tokenizer.json", 320)
    print(f"{folder}: {pictures} pictures to train on, {len(both)} held out, a tokenizer of {size} ids")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/coca-data"))
    parser.add_argument("--pictures", type=int, default=30_000, help="to train on")
    parser.add_argument("--held-out", type=int, default=512, help="pictures, half with captions new to the model")
    arguments = parser.parse_args()
    prepare(arguments.folder, arguments.pictures, arguments.held_out)
