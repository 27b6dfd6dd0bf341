"""The original's continuous dataset and sampler: FILE SEQUENCE_LENGTH samples|open."""

import sys
import time
from pathlib import Path

BEGAN = time.monotonic()

import numpy as np  # noqa: E402
from timing import BATCH, batches_of, samples_per_second, tell  # noqa: E402
from torch.utils.data import BatchSampler  # noqa: E402

from modalities.dataloader.dataloader import LLMDataLoader  # noqa: E402
from modalities.dataloader.dataset import PackedMemMapDatasetContinuous  # noqa: E402
from modalities.dataloader.samplers import ResumableDistributedSampler  # noqa: E402
from modalities.models.gpt2.collator import GPT2LLMCollateFn  # noqa: E402


def opened(path, length):
    return PackedMemMapDatasetContinuous(path, sample_key="tokens", block_size=length + 1, reuse_last_target=True)


def samples(path, length):
    dataset = opened(path, length)

    def stacked(indices):
        return np.stack([dataset[int(i)]["tokens"] for i in indices])

    sampler = ResumableDistributedSampler(dataset, rank=0, num_replicas=1, shuffle=True, drop_last=True)
    loader = LLMDataLoader(
        dataloader_tag="train", dataset=dataset, batch_sampler=BatchSampler(sampler, BATCH, drop_last=True),
        collate_fn=GPT2LLMCollateFn("tokens", "targets"), num_workers=0,
    )  # fmt: skip
    rates = {
        "samples alone, int32": samples_per_second(lambda indices: [dataset[int(i)] for i in indices], len(dataset)),
        "int32 batch": samples_per_second(stacked, len(dataset)),
        "int64 batch": samples_per_second(lambda indices: stacked(indices).astype(np.int64), len(dataset)),
        "tensors of its loader": samples_per_second(batches_of(loader), len(dataset)),
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
