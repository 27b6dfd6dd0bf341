"""How long training stands still for a checkpoint: written in the background, and waited for, in turn.

    python tools/bench/training/checkpoint_stall.py --rounds 3 --save benchmarks/results/checkpoint-stall

Both train the same decoder through our trainer, AdamW in float32, and save it every few steps with the sharded format:
weights and two moments. The times are those that the run reports of each save; the last of a run, which is waited for
in any case, does not count. Ratios are taken within rounds.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import turns

from modalities_core.events import CheckpointSaved
from modalities_core.training.checkpointing import Checkpoints
from modalities_core.training.executor import Plain
from modalities_core.training.optim import adamw
from modalities_core.training.schedule import Constant
from modalities_core.training.trainer import Trainer
from modalities_core.training.world import Alone
from modalities_data.datasets.memory import InMemoryDataset
from modalities_data.loading.batches import ShuffledBatches
from modalities_models.decoder import decoder
from modalities_models.losses import CrossEntropy
from modalities_parallel.checkpoint.sharded import Sharded

WAYS = {"waited for": False, "in the background": True}
VOCABULARY = 16_384


class Saves:
    """Keeps what was reported of checkpoints."""

    def __init__(self) -> None:
        self.events: list[CheckpointSaved] = []

    def consume(self, event: object) -> None:
        if isinstance(event, CheckpointSaved):
            self.events.append(event)

    def close(self) -> None:
        pass


def measure(options: argparse.Namespace, asynchronous: bool) -> dict:
    """One run: medians over its saves, and how long all of it took."""
    world, sink = Alone(options.device), Saves()
    with torch.device(world.device):
        model = decoder(
            vocab_size=VOCABULARY,
            hidden_size=options.hidden_size,
            layers=options.layers,
            heads=8,
            sequence_length=options.sequence_length,
        )
    with torch.no_grad():
        values = dict(model.initial_values())
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 1 << 16)
    dataset = InMemoryDataset(tokens, options.sequence_length)
    steps = options.every * options.saves + 1
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        trainer = Trainer(
            world=world,
            executor=Plain(model, CrossEntropy(), world),
            optimizer=adamw(model, lr=1e-4),
            schedule=Constant(),
            batches=ShuffledBatches(
                dataset, world, samples_per_step=options.batch_size, micro_batch_size=options.batch_size
            ),
            steps=steps,
            checkpoints=Checkpoints(Sharded(), every=options.every, keep=1, asynchronous=asynchronous),
            sinks=[sink],
            log_every=steps,
        )
        start = time.perf_counter()
        trainer.run(Path(folder))
        seconds = time.perf_counter() - start
    saves = sink.events[:-1]
    assert len(saves) == options.saves
    del trainer, model
    gc.collect()
    return {
        "bytes": saves[0].bytes,
        "blocked_seconds": statistics.median(event.blocked_seconds for event in saves),
        "most_blocked_seconds": max(event.blocked_seconds for event in saves),
        "save_seconds": statistics.median(event.seconds for event in saves),
        "run_seconds": seconds,
    }


def report(result: dict) -> str:
    """A table, and the ratio that this is about."""
    medians = {way: turns.medians(rounds) for way, rounds in result["rounds"].items()}
    rows = [
        [
            way,
            f"{found['blocked_seconds']:.3f}",
            f"{found['most_blocked_seconds']:.3f}",
            f"{found['save_seconds']:.2f}",
            f"{found['run_seconds']:.1f}",
        ]
        for way, found in medians.items()
    ]
    headings = [
        "a save",
        "training stood still, s",
        "at most, s",
        "from the step to the commit, s",
        "all of the run, s",
    ]
    ratios = result["ratios"]
    lines = [
        f"{next(iter(medians.values()))['bytes'] / 1e6:,.0f} MB of state, {result['device']}, {result['every']} steps "
        f"between saves",
        "",
        turns.markdown(headings, rows),
        "",
        f"stood still in the background / waited for: median {statistics.median(ratios):.1%}, from {min(ratios):.1%} "
        f"to {max(ratios):.1%} in {len(ratios)} rounds",
        *turns.origin(result),
    ]
    return "\n".join(lines)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    parser.add_argument("--folder", type=Path, help="of the checkpoints (default: the system's for temporary files)")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--every", type=int, default=10, help="steps between two saves")
    parser.add_argument("--saves", type=int, default=3, help="of each run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", type=Path, help="write PATH.json and PATH.md")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> dict:
    options = arguments(words)
    rounds = turns.in_turn(list(WAYS), options.rounds, lambda way, number: measure(options, WAYS[way]))
    pairs = zip(*(rounds[way] for way in WAYS), strict=True)
    result = {
        **turns.provenance(("--folder", "--save")),
        "load_behind": os.getloadavg()[0],
        "versions": {"torch": torch.__version__},
        "device": options.device,
        "every": options.every,
        "rounds": rounds,
        "ratios": [behind["blocked_seconds"] / waited["blocked_seconds"] for waited, behind in pairs],
    }
    turns.tell(result, report(result), options.save)
    return result


if __name__ == "__main__":
    main()
