"""Our dataset: FOLDER SEQUENCE_LENGTH samples|open."""

import sys
import time
from pathlib import Path

BEGAN = time.monotonic()

import numpy as np  # noqa: E402
from timing import BATCH, batches_of, samples_per_second, tell  # noqa: E402

from modalities_data.datasets import PackedDataset  # noqa: E402
from modalities_data.order import shuffled  # noqa: E402

STEP = 512
"""Samples of a step, which is how much the batches of a run ask for at once."""


def opened(folder, length, documents="joined"):
    # Checksums are read once per machine, by no peer, and those of sparse files are made up.
    return PackedDataset(folder, length, documents=documents, verify="none")


def samples(folder, length):
    dataset, separate = opened(folder, length), opened(folder, length, "separate")
    sharded = opened(folder.parent / "sharded", length)
    count = len(dataset)

    def as_int64(indices):
        return dataset.gather(indices).tokens.astype(np.int64)

    def with_documents(indices):
        found = separate.gather(indices)
        return found.tokens.astype(np.int64), found.segments

    steps = (dataset.gather(shuffled(np.arange(at, at + STEP), count, 0)).tokens.astype(np.int64)
             for at in range(0, sys.maxsize, STEP))  # fmt: skip
    reads = {
        "int64 batch": as_int64,
        "int32 batch": lambda indices: dataset.gather(indices).tokens.astype(np.int32),
        "batch as stored, uint16": lambda indices: dataset.gather(indices).tokens,
        "int64 batch, of 16 shards": lambda indices: sharded.gather(indices).tokens.astype(np.int64),
        "int64 batch, with documents": with_documents,
        "documents alone": lambda indices: separate._segments(indices),
    }
    large = {
        "int64 batch, of 512": as_int64,
        "int64 batch, of 512, with documents": with_documents,
        "int64 batch, of 512, shuffled order": batches_of(steps),
    }
    rates = {name: samples_per_second(read, count) for name, read in reads.items()}
    rates |= {name: samples_per_second(read, count, batch=STEP) for name, read in large.items()}
    rates |= tensors(dataset, separate)
    return {"rates": rates, "first": dataset.gather(np.array([7])).tokens[0].tolist()[:8], "stride": length}


def tensors(dataset, separate):
    """What training takes: shuffled micro batches of inputs and targets, read ahead; needs torch."""
    try:
        import torch

        from modalities_data.loading.batches import ShuffledBatches
    except ImportError:
        return {}
    from types import SimpleNamespace

    torch.set_num_threads(1)
    world = SimpleNamespace(data_rank=0, data_size=1, device=torch.device("cpu"))

    def rate(dataset):
        batches = ShuffledBatches(dataset, world, STEP, BATCH)
        read = batches_of(batch for step in range(sys.maxsize) for batch in batches.micro_batches(step))
        return samples_per_second(read, len(dataset))

    return {"tensors of its loader": rate(dataset), "tensors of its loader, with documents": rate(separate)}


def opening(folder, length):
    imported = time.monotonic()
    dataset = opened(folder, length)
    at = time.monotonic()
    count = len(dataset)
    far = np.arange(5 * count // 3, 5 * count // 3 + BATCH, dtype=np.int64)
    dataset.gather(shuffled(far, count, 0))
    return {"samples": count, "import": imported - BEGAN, "open": at - imported, "seek": time.monotonic() - at}


if __name__ == "__main__":
    folder, length, what = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    tell(**(samples if what == "samples" else opening)(folder, length))
