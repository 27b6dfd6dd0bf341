"""The original's continuous dataset and sampler: FILE SEQUENCE_LENGTH samples|open."""

import sys
import time
from pathlib import Path

BEGAN = time.monotonic()

import numpy as np  # noqa: E402
from timing import samples_per_second, tell  # noqa: E402

from modalities.dataloader.dataset import PackedMemMapDatasetContinuous  # noqa: E402
from modalities.dataloader.samplers import ResumableDistributedSampler  # noqa: E402


def opened(path, length):
    return PackedMemMapDatasetContinuous(path, sample_key="tokens", block_size=length + 1, reuse_last_target=True)


def samples(path, length):
    dataset = opened(path, length)

    def as_int64(indices):
        return np.stack([dataset[int(i)]["tokens"] for i in indices]).astype(np.int64)

    rates = {
        "samples alone": samples_per_second(lambda indices: [dataset[int(i)] for i in indices], len(dataset)),
        "int64 batch": samples_per_second(as_int64, len(dataset)),
    }
    return {"rates": rates, "first": dataset[7]["tokens"].tolist()[:8], "stride": length}


def opening(path, length):
    imported = time.monotonic()
    dataset = opened(path, length)
    at = time.monotonic()
    sampler = ResumableDistributedSampler(dataset, rank=0, num_replicas=1, shuffle=True, drop_last=True)
    dataset[next(iter(sampler))]
    return {
        "samples": len(dataset), "import": imported - BEGAN, "open": at - imported, "seek": time.monotonic() - at
    }  # fmt: skip


if __name__ == "__main__":
    path, length, what = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    tell(**(samples if what == "samples" else opening)(path, length))
