"""How well a trained captioner finds and describes pictures it has never seen, in figures and as a picture.

python examples/coca/show.py runs/coca --picture coca.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from modalities_cli.wiring import open_run, trained_model
from modalities_data.datasets import ImageTextDataset
from modalities_data.image_text import read_captions, read_manifest
from modalities_models.captions import generate_captions, recall

BATCH = 128


def measure(run: Path, data: Path) -> dict:
    """Vectors, captions and scores of the held-out pictures in ``data``."""
    graph = open_run(run)
    tokenizer = graph.build("tokenizer")
    model, step = trained_model(graph, run)
    model.eval()
    dataset = ImageTextDataset(data / "held_out", tokenizer, model.sequence_length)
    samples = dataset.gather(np.arange(len(dataset)))
    pictures = torch.from_numpy(samples.images).permute(0, 3, 1, 2)
    tokens = torch.from_numpy(samples.tokens[:, :-1].astype(np.int64))
    segments = torch.from_numpy(samples.segments)
    images, texts, written = [], [], []
    with torch.no_grad():
        for part in torch.arange(len(dataset)).split(BATCH):
            images.append(model.encode_images(pictures[part])[1])
            texts.append(model.encode_texts(tokens[part], segments[part]))
            ids = generate_captions(model, pictures[part], tokenizer.end_of_document)
            written += [tokenizer.decode(caption) for caption in ids]
    true = _captions(data / "held_out")
    trained_on = set(_captions(data / "train"))
    return {
        "step": step,
        "pictures": samples.images,
        "images": torch.cat(images),
        "texts": torch.cat(texts),
        "written": written,
        "true": true,
        "right": np.array([a == b for a, b in zip(written, true, strict=True)]),
        "new": np.array([caption not in trained_on for caption in true]),
    }


def report(found: dict) -> dict[str, float]:
    """The scores, as shares; chance is that of guessing."""
    pairs = len(found["true"])
    first, fifth = recall(found["images"], found["texts"]), recall(found["images"], found["texts"], k=5)
    right, new = found["right"], found["new"]
    return {
        "pairs": pairs,
        "recall@1 text of image": first.text_of_image,
        "recall@1 image of text": first.image_of_text,
        "recall@1 chance": 1 / pairs,
        "recall@5 text of image": fifth.text_of_image,
        "recall@5 image of text": fifth.image_of_text,
        "recall@5 chance": 5 / pairs,
        "captions right": float(right.mean()),
        "captions right, caption never in training": float(right[new].mean()) if new.any() else float("nan"),
        "captions right, caption in training": float(right[~new].mean()) if (~new).any() else float("nan"),
    }


def draw(found: dict, file: Path, rows: int = 4, columns: int = 4, matrix: int = 32, seed: int = 3) -> None:
    """Held-out pictures with what the model says of them, and how similar it finds pictures and captions."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("this needs matplotlib: pip install -r examples/coca/requirements.txt") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    order = np.random.default_rng(seed).permutation(len(found["true"]))
    figure = plt.figure(figsize=(13, 7), dpi=100)
    left, right = figure.subfigures(1, 2, width_ratios=[6.6, 6.4])
    for place, number in enumerate(order[: rows * columns].tolist()):
        axes = left.add_subplot(rows, columns, place + 1)
        axes.imshow(found["pictures"][number], interpolation="nearest")
        axes.set_axis_off()
        good = found["right"][number]
        axes.set_title(_broken(found["written"][number]), fontsize=8.5, color="#1a7f37" if good else "#b3261e", pad=3)
        if not good:
            truth = f"it is {_broken(found['true'][number])}"
            axes.text(1.05, 0.5, truth, fontsize=6.5, color="#555555", rotation=90, va="center", ha="left",
                      transform=axes.transAxes)  # fmt: skip
    scores = report(found)
    left.suptitle(f"Held-out pictures and what the model writes: {scores['captions right']:.0%} right", fontsize=11)
    left.subplots_adjust(top=0.87, bottom=0.02, left=0.02, right=0.96, hspace=0.4, wspace=0.15)
    some = torch.from_numpy(order[:matrix])
    axes = right.add_subplot()
    similar = (found["images"][some] @ found["texts"][some].T).numpy()
    shown = axes.imshow(similar, cmap="viridis", vmin=0.0, vmax=1.0)
    axes.set_xlabel(f"captions of {matrix} held-out pairs")
    axes.set_ylabel("their pictures")
    right.suptitle(
        f"Similarity; recall@1 among all {scores['pairs']} pairs: text of a picture "
        f"{scores['recall@1 text of image']:.0%},\npicture of a text {scores['recall@1 image of text']:.0%} "
        f"(chance {scores['recall@1 chance']:.1%})",
        fontsize=11,
    )
    right.colorbar(shown, ax=axes, fraction=0.046, pad=0.03, label="cosine of their vectors")
    right.subplots_adjust(top=0.89, bottom=0.07, left=0.09, right=0.9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _broken(text: str) -> str:
    """In two lines, behind the first thing."""
    for word in (" left of ", " above "):
        text = text.replace(word, f"{word.rstrip()}\n", 1)
    return text


def _captions(folder: Path) -> list[str]:
    return [caption.text for caption in read_captions(folder, read_manifest(folder))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of the run")
    parser.add_argument("--data", type=Path, default=Path("runs/coca-data"), help="what prepare.py made")
    parser.add_argument("--picture", type=Path, help="a PNG to draw")
    parser.add_argument("--json", action="store_true", help="end with the scores as one line of JSON")
    arguments = parser.parse_args()
    found = measure(arguments.run, arguments.data)
    scores = report(found)
    print(f"step {found['step']}, {len(found['true'])} held-out pairs")
    for name, value in scores.items():
        if name != "pairs":
            print(f"{name:>42}  {value:6.1%}")
    if arguments.picture is not None:
        draw(found, arguments.picture)
        print(f"drawn: {arguments.picture}")
    if arguments.json:
        print(json.dumps(scores))
