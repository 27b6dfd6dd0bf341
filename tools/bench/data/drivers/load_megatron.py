"""Megatron-LM's GPTDataset: PREFIX SEQUENCE_LENGTH CACHE. Run by run_in_megatron.py, so that its packages are found."""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split, compile_helpers
from timing import samples_per_second, tell


def main(prefix, length, cache):
    compile_helpers()
    tokenizer = SimpleNamespace(eod=0, pad=-1, vocab_size=50_000, unique_identifiers={"class": "bench"})

    def dataset(reset):
        config = GPTDatasetConfig(
            random_seed=0, sequence_length=length, blend=([prefix], None), split="1,0,0", path_to_cache=cache,
            tokenizer=tokenizer, reset_position_ids=reset, reset_attention_mask=reset, eod_mask_loss=False,
            create_attention_mask=reset,
        )  # fmt: skip
        source = GPTDataset.build_low_level_dataset(prefix, config)
        documents = np.arange(source.document_indices.shape[0] - 1, dtype=np.int32)
        return GPTDataset(source, prefix, documents, None, Split.train, config)

    plain, masked = dataset(False), dataset(True)
    rates = {
        "samples alone": samples_per_second(lambda indices: [plain[int(i)] for i in indices], len(plain)),
        "int64 batch": samples_per_second(
            lambda indices: torch.stack([plain[int(i)]["tokens"] for i in indices]), len(plain)
        ),
        "with document masks": samples_per_second(
            lambda indices: [masked[int(i)] for i in indices], len(masked), batch=2
        ),
    }
    tell(rates=rates, first=None, stride=0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
