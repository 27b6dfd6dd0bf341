"""The tables of packages/modalities-parallel/docs/scaling.md: 8B and 70B on 1 to 4096 H100, by ``modalities plan``.

python tools/plan_scaling.py > table.md
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from modalities_cli.plan import built
from modalities_parallel.planning.devices import DEVICES
from modalities_parallel.planning.run import Estimate, PlannedRun, Recomputation, estimated

CONFIG = Path(__file__).resolve().parent.parent / "config_files" / "llama_1b_fsdp.yaml"
COMMON = ("model.model.preset=llama3-8b", "model.model.vocab_size=128256", "settings.sequence_length=8192")
MODELS = {
    "8B": (),
    "70B": (
        "model.model.hidden_size=8192",
        "model.model.layers=80",
        "model.model.heads=64",
        "model.model.head_size=128",
        "model.model.intermediate_size=28672",
    ),
}
RECOMPUTATION: dict[str, Recomputation] = {"8B": "selective", "70B": "whole_blocks"}
DEVICE_COUNTS = (1, 8, 64, 512, 4096)
GROUP = 64
"""Devices that share one copy of the model, where the table says HSDP."""


def planned(name: str, devices: int, replicas: int) -> tuple[PlannedRun, Estimate]:
    """One sequence of 8192 tokens per device and step."""
    batch = (f"trainer.batches.samples_per_step={devices}", "settings.micro_batch_size=1")
    run = built(CONFIG, (*COMMON, *MODELS[name], *batch, f"world.dp_replicate={replicas}"), devices)
    run = replace(run, recomputation=RECOMPUTATION[name])
    return run, estimated(run, DEVICES["h100"])


def main() -> None:
    """Print one table per model."""
    for name in MODELS:
        print(f"\n### {name}\n")
        print("| devices | sharded over | memory | step | hidden communication | exposed | tokens/s per device | MFU |")
        print("|---|---|---|---|---|---|---|---|")
        for devices in DEVICE_COUNTS:
            for replicas in dict.fromkeys((1, max(1, devices // GROUP))):
                print(row(*planned(name, devices, replicas)))


def row(run: PlannedRun, estimate: Estimate) -> str:
    """One line of a table."""
    time, shards = estimate.time, run.layout.shards
    over = f"{shards}, {run.layout.replicas} copies" if run.layout.replicas > 1 else str(shards)
    fits = "" if estimate.memory.total <= DEVICES["h100"].memory else " (does not fit)"
    cells = (
        f"{run.ranks}",
        over,
        f"{estimate.memory.total / 1e9:.1f} GB{fits}",
        f"{time.total:.3f} s",
        f"{time.communication - time.exposed:.3f} s",
        f"{time.exposed:.3f} s",
        f"{estimate.tokens_per_second:,.0f}",
        f"{estimate.mfu:.1%}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
