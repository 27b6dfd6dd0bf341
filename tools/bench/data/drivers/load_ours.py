"""Our dataset: FOLDER SEQUENCE_LENGTH samples|open."""

import sys
import time
from pathlib import Path

BEGAN = (time.monotonic(), time.process_time())

import numpy as np  # noqa: E402
from timing import BATCH, samples_per_second, tell  # noqa: E402

from modalities_data.datasets import PackedDataset  # noqa: E402
from modalities_data.order import shuffled  # noqa: E402


def samples(folder, length):
    dataset = PackedDataset(folder, length)
    count = len(dataset)

    def as_int64(indices):
        return dataset.gather(indices).tokens.astype(np.int64)

    position = 0

    def in_order(_):
        nonlocal position
        places = np.arange(position, position + BATCH, dtype=np.int64)
        position += BATCH
        return dataset.gather(shuffled(places, count, 0)).tokens.astype(np.int64)

    rates = {
        "int64 batch": samples_per_second(as_int64, count),
        "int64 batch of 512": samples_per_second(as_int64, count, batch=512),
        "int64 batch, shuffled order": samples_per_second(in_order, count),
        "batch as stored": samples_per_second(lambda indices: dataset.gather(indices).tokens, count),
    }
    return {"rates": rates, "first": dataset.gather(np.array([7])).tokens[0].tolist()[:8], "stride": length}


def opening(folder, length):
    imported = time.monotonic()
    dataset = PackedDataset(folder, length)
    opened = time.monotonic()
    count = len(dataset)
    far = np.arange(5 * count // 3, 5 * count // 3 + BATCH, dtype=np.int64)
    dataset.gather(shuffled(far, count, 0))
    done = time.monotonic()
    return {"samples": count, "import": imported - BEGAN[0], "open": opened - imported, "seek": done - opened}


if __name__ == "__main__":
    folder, length, what = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    tell(**(samples if what == "samples" else opening)(folder, length))
