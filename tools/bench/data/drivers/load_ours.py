"""Our dataset: FOLDER SEQUENCE_LENGTH samples|open."""

import sys
import time
from pathlib import Path

BEGAN = time.monotonic()

import numpy as np  # noqa: E402
from timing import BATCH, samples_per_second, tell  # noqa: E402

from modalities_data.datasets import PackedDataset  # noqa: E402
from modalities_data.order import shuffled  # noqa: E402

STEP = 512


def samples(folder, length):
    dataset = PackedDataset(folder, length)
    count = len(dataset)

    def as_int64(indices):
        return dataset.gather(indices).tokens.astype(np.int64)

    waiting = []
    position = 0

    def in_order(_):
        nonlocal position
        if not waiting:  # as many as a step has, which is how the batches of a run ask
            places = np.arange(position, position + STEP, dtype=np.int64)
            waiting.extend(np.split(shuffled(places, count, 0), STEP // BATCH))
            position += STEP
        return as_int64(waiting.pop())

    separate = PackedDataset(folder, length, documents="separate")

    def with_documents(indices):
        found = separate.gather(indices)
        return found.tokens.astype(np.int64), found.segments

    rates = {
        "int64 batch": samples_per_second(as_int64, count),
        "int64 batch of 512": samples_per_second(as_int64, count, batch=512),
        "int64 batch, shuffled order": samples_per_second(in_order, count),
        "int64 batch with documents": samples_per_second(with_documents, count),
        "batch as stored": samples_per_second(lambda indices: dataset.gather(indices).tokens, count),
    }
    return {"rates": rates, "first": dataset.gather(np.array([7])).tokens[0].tolist()[:8], "stride": length}


def opening(folder, length):
    imported = time.monotonic()
    dataset = PackedDataset(folder, length, verify="none")  # the checksums of sparse files are made up
    opened = time.monotonic()
    count = len(dataset)
    far = np.arange(5 * count // 3, 5 * count // 3 + BATCH, dtype=np.int64)
    dataset.gather(shuffled(far, count, 0))
    done = time.monotonic()
    return {"samples": count, "import": imported - BEGAN, "open": opened - imported, "seek": done - opened}


if __name__ == "__main__":
    folder, length, what = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    tell(**(samples if what == "samples" else opening)(folder, length))
