"""Draw losses from what runs wrote into their ``metrics.jsonl``.

One run, training and held out: ``python tools/plot_loss.py runs/quickstart docs/quickstart_loss.png``.
Several runs over steps: ``python tools/plot_loss.py --steps AdamW=runs/adamw Muon=runs/muon docs/muon_quickstart.png``.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes


def main(runs: dict[str, Path], picture: Path, over_steps: bool) -> None:
    """Losses over tokens or steps; with several runs, training losses are thin lines."""
    figure, axes = plt.subplots(figsize=(7, 3.2), dpi=150)
    drawn = [
        draw(axes, name if len(runs) > 1 else "", folder, over_steps, f"C{2 * color}")
        for color, (name, folder) in enumerate(runs.items())
    ]
    if len(runs) > 1:
        # The first steps are nearly the same for all, and would press what differs into a corner.
        end = max(place for place, _ in drawn[0])
        losses = [loss for points in drawn for place, loss in points if place > 0.1 * end]
        axes.set_ylim(0.98 * min(losses), 1.02 * max(losses))
    axes.set_xlabel("steps" if over_steps else "million tokens")
    axes.set_ylabel("nats per token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)


def draw(axes: Axes, name: str, folder: Path, over_steps: bool, color: str) -> list[tuple[float, float]]:
    """Training and held-out loss of one run; gives every place and loss."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [record for record in records if record["event"] == "step_logged"]
    held_out = [record for record in records if record["event"] == "evaluated"]
    per_step = 1 if over_steps else training[0]["tokens"] / training[0]["step"] / 1e6
    both = f"{name}, " if name else ""
    (line,) = axes.plot([r["step"] * per_step for r in training], [r["loss"] for r in training], linewidth=1.2)
    line.set_label(f"{both}training")
    places = [record["step"] * per_step for record in held_out]
    (points,) = axes.plot(places, [record["loss"] for record in held_out], "o-", markersize=4)
    points.set_label(f"{both}held out")
    if name:
        line.set(linewidth=0.7, alpha=0.5, color=color)
        points.set_color(color)
    return [(record["step"] * per_step, record["loss"]) for record in [*training, *held_out]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]FOLDER")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--steps", action="store_true", help="over steps instead of tokens")
    given = parser.parse_args()
    named = [run.rpartition("=") for run in given.runs]
    main({name or folder: Path(folder) for name, _, folder in named}, given.picture, given.steps)
