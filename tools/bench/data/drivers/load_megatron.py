"""Megatron-LM's GPTDataset: REPOSITORY PREFIX SEQUENCE_LENGTH CACHE. Run by run_in_megatron.py, for its packages.

Its C++ helpers are compiled into CACHE, so that the repository stays as it is.
"""

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import pybind11
import torch
from timing import samples_per_second, tell

HELPERS = "megatron.core.datasets.helpers_cpp"


def compile_helpers(repository, cache):
    """What its Makefile does, to another place."""
    Path(cache).mkdir(parents=True, exist_ok=True)
    target = Path(cache) / f"helpers_cpp{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not target.is_file():
        source = Path(repository) / "megatron" / "core" / "datasets" / "helpers.cpp"
        include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
        flags = ["-O3", "-Wall", "-shared", "-std=c++17", "-fPIC"]
        subprocess.run(["g++", *flags, *include, str(source), "-o", str(target)], check=True)
    spec = importlib.util.spec_from_file_location(HELPERS, target)
    sys.modules[HELPERS] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[HELPERS])


def main(repository, prefix, length, cache):
    compile_helpers(repository, cache)
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

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
        "samples alone, int64": samples_per_second(lambda indices: [plain[int(i)] for i in indices], len(plain)),
        "int64 batch": samples_per_second(
            lambda indices: torch.stack([plain[int(i)]["tokens"] for i in indices]), len(plain)
        ),
        "samples alone, int64, with document masks": samples_per_second(
            lambda indices: [masked[int(i)] for i in indices], len(masked), batch=2
        ),
    }
    tell(rates=rates, first=None, stride=0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
