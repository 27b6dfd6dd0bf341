"""The smallest parts a trainer can be built from: a model, data, a loss, a checkpoint format, a sink."""

from __future__ import annotations

import copy
import json
import zlib
from pathlib import Path

import torch
from torch import nn

from modalities_core.interfaces import Batch, LossSum, ParallelPlan

VOCAB_SIZE = 11
SEQUENCE_LENGTH = 6


class TinyModel(nn.Module):
    """Embedding, dropout, one hidden layer, norm and a head."""

    def __init__(self, dropout: float = 0.0, seed: int = 0, hidden_size: int = 8) -> None:
        super().__init__()
        self.vocab_size = VOCAB_SIZE
        self.sequence_length = SEQUENCE_LENGTH
        self.embedding = nn.Embedding(VOCAB_SIZE, hidden_size)
        self.hidden = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(hidden_size)
        self.head = nn.Linear(hidden_size, VOCAB_SIZE, bias=False)
        if not self.head.weight.is_meta:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.copy_(
                        0.4 * torch.randn(parameter.shape, generator=generator) + float(parameter is self.norm.weight)
                    )

    def forward(self, tokens_BT):
        return self.norm(self.dropout(torch.tanh(self.hidden(self.embedding(tokens_BT)))))

    def parallel_plan(self):
        return ParallelPlan()

    def initial_values(self):
        yield from ((name, value.detach()) for name, value in self.named_parameters())

    def flops_per_token(self, sequence_length):
        return 6.0 * sum(value.numel() for value in self.parameters())


def summed_cross_entropy(hidden_BTD, head, batch):
    losses = nn.functional.cross_entropy(head(hidden_BTD).flatten(0, 1), batch.targets_BT.flatten(), reduction="none")
    weights = torch.ones_like(losses) if batch.weights_BT is None else batch.weights_BT.flatten().to(losses)
    return LossSum((losses * weights).sum(), weights.sum())


class TinyBatches:
    """Random tokens that depend on the number of the sample and nothing else; about a third does not count."""

    sequence_length = SEQUENCE_LENGTH
    largest_id = VOCAB_SIZE - 1

    def __init__(self, samples_per_step=8, micro_batch_size=4, rank=0, ranks=1, weighted=True, seed=0):
        self.samples_per_step = samples_per_step
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.ranks = ranks
        self.weighted = weighted
        self.seed = seed
        self.fingerprint = f"tiny-{seed}"

    def micro_batches(self, step):
        share = self.samples_per_step // self.ranks
        first = step * self.samples_per_step + self.rank * share
        samples = range(first, first + share)
        return [
            self.batch(samples[start : start + self.micro_batch_size])
            for start in range(0, share, self.micro_batch_size)
        ]

    def batch(self, samples):
        rows = [torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{number}".encode())) for number in samples]
        tokens = torch.stack([torch.randint(0, VOCAB_SIZE, (SEQUENCE_LENGTH + 1,), generator=row) for row in rows])
        weights = torch.stack([(torch.rand(SEQUENCE_LENGTH, generator=row) < 0.67).float() for row in rows])
        return Batch(tokens[:, :-1], tokens[:, 1:], weights if self.weighted else None)


class TinyHeldOut:
    """Three batches of which the last has a row of padding."""

    sequence_length = SEQUENCE_LENGTH
    largest_id = VOCAB_SIZE - 1

    def __init__(self, bytes_per_token=None, batches=3, weight=1.0):
        self.bytes_per_token = bytes_per_token
        self.batches = batches
        self.weight = weight

    def __iter__(self):
        source = TinyBatches(seed=1)
        for place in range(self.batches):
            batch = source.batch(range(2 * place, 2 * place + 2))
            weights = torch.full_like(batch.weights_BT, self.weight)
            if place == self.batches - 1:
                weights[-1] = 0
            yield Batch(batch.tokens_BT, batch.targets_BT, weights)


class TorchFiles:
    """Two files by torch.save."""

    def save(self, folder: Path, model, optimizer) -> None:
        torch.save(model.state_dict(), folder / "model.pt")
        (folder / "more").mkdir()
        torch.save(optimizer.state_dict(), folder / "more" / "optimizer.pt")

    def load(self, folder: Path, model, optimizer) -> None:
        model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
        if optimizer is not None:
            optimizer.load_state_dict(torch.load(folder / "more" / "optimizer.pt", weights_only=True))


class StagedFiles(TorchFiles):
    """The same, written in the background; ``during`` is called in there before and after the files are written."""

    def __init__(self, during=lambda place: None):
        self.during = during

    def stage(self, model, optimizer):
        states = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())

        def write(folder, world):
            self.during("before")
            torch.save(states[0], folder / "model.pt")
            (folder / "more").mkdir()
            torch.save(states[1], folder / "more" / "optimizer.pt")
            self.during("after")

        return write


class Collector:
    """Keeps all events."""

    def __init__(self):
        self.events = []

    def consume(self, event):
        self.events.append(event)

    def close(self):
        pass

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


def measured(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    """What a run measured, without what depends on the clock, in the order of the file."""
    timing = {"time", "seconds", "tokens_per_second", "tokens_per_second_per_device", "mfu", "mfu_causal"}
    timing |= {"peak_flops", "memory_bytes", "memory", "folder"}
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    kept = [line for line in lines if line["event"] in ("step_logged", "evaluated")]
    return [{key: value for key, value in line.items() if key not in timing} for line in kept]
