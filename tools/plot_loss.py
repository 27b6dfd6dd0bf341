"""Draw the loss of a run: ``python tools/plot_loss.py runs/quickstart docs/quickstart_loss.png``."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main(folder: Path, picture: Path) -> None:
    """Training and held-out loss over tokens, from ``metrics.jsonl``."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["event"] == "step_logged"]
    held_out = [record for record in records if record["event"] == "evaluated"]
    tokens_per_step = steps[0]["tokens"] / steps[0]["step"]
    figure, axes = plt.subplots(figsize=(7, 3.2), dpi=150)
    axes.plot([r["tokens"] / 1e6 for r in steps], [r["loss"] for r in steps], label="training", linewidth=1.2)
    held_out_tokens = [record["step"] * tokens_per_step / 1e6 for record in held_out]
    axes.plot(held_out_tokens, [record["loss"] for record in held_out], "o-", label="held out", markersize=4)
    axes.set_xlabel("million tokens")
    axes.set_ylabel("nats per token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
