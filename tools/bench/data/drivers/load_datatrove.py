"""datatrove's folder dataset: FOLDER SEQUENCE_LENGTH samples|open."""

import sys
import time

BEGAN = time.monotonic()

import torch  # noqa: E402
from datatrove.utils.dataset import DatatroveFolderDataset  # noqa: E402
from timing import BATCH, batches_of, samples_per_second, tell  # noqa: E402


def opened(folder, length, **more):
    return DatatroveFolderDataset(folder, seq_len=length, filename_pattern="*.ds", token_size=2, **more)


def samples(folder, length):
    dataset = opened(folder, length)
    with_positions = opened(folder, length, return_positions=True, positions_from_eos_token_id=0)

    def batch(indices):
        return torch.stack([dataset[int(i)]["input_ids"] for i in indices])

    loader = torch.utils.data.DataLoader(dataset, BATCH, shuffle=True, num_workers=0, drop_last=True)
    rates = {
        "samples alone, int64": samples_per_second(lambda indices: [dataset[int(i)] for i in indices], len(dataset)),
        "int64 batch": samples_per_second(batch, len(dataset)),
        "samples alone, int64, with positions": samples_per_second(
            lambda indices: [with_positions[int(i)] for i in indices], len(dataset)
        ),
        "tensors of its loader": samples_per_second(batches_of(loader), len(dataset)),
    }
    return {"rates": rates, "first": dataset[7]["input_ids"].tolist()[:8], "stride": length + 1}


def opening(folder, length):
    imported = time.monotonic()
    dataset = opened(folder, length)
    at = time.monotonic()
    dataset[2 * len(dataset) // 3]
    return {
        "samples": len(dataset), "import": imported - BEGAN, "open": at - imported, "seek": time.monotonic() - at
    }  # fmt: skip


if __name__ == "__main__":
    folder, length, what = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    tell(**(samples if what == "samples" else opening)(folder, length))
