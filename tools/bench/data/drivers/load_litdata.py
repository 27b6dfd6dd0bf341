"""litdata's streaming dataset of tokens: FILE SEQUENCE_LENGTH samples. Optimizes the file first, outside the clock.

All in one chunk: random reads across chunks, which its own shuffling avoids, would be several times slower.
"""

import sys
import tempfile

import numpy as np
import torch
from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize
from timing import BATCH, batches_of, samples_per_second, tell

TOKENS = 1 << 20


def pieces(start, path):
    yield torch.from_numpy(np.fromfile(path, "<u2", TOKENS, offset=2 * start).astype(np.int32))


class Pieces:
    """Reads one stretch of the file; an object, because litdata sends it to a process."""

    def __init__(self, path):
        self.path = path

    def __call__(self, start):
        yield from pieces(start, self.path)


def main(path, length):
    count = np.memmap(path, "<u2", "r").size
    with tempfile.TemporaryDirectory() as folder:
        optimize(
            fn=Pieces(path), inputs=list(range(0, count - TOKENS, TOKENS)), output_dir=folder,
            chunk_size=count, item_loader=TokensLoader(block_size=length + 1), num_workers=1,
        )  # fmt: skip
        dataset = StreamingDataset(folder, item_loader=TokensLoader(block_size=length + 1), shuffle=False)
        loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0, drop_last=True)
        rates = {
            "samples alone, int32": samples_per_second(
                lambda indices: [dataset[int(i)] for i in indices], len(dataset)
            ),
            "int32 batch": samples_per_second(
                lambda indices: torch.stack([dataset[int(i)] for i in indices]), len(dataset)
            ),
            "int64 batch": samples_per_second(
                lambda indices: torch.stack([dataset[int(i)] for i in indices]).long(), len(dataset)
            ),
            "tensors of its loader": samples_per_second(batches_of(loader), len(dataset)),
        }
        tell(rates=rates, first=dataset[7].tolist()[:8], stride=length + 1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
