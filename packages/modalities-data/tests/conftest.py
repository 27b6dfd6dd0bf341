"""What several tests of modalities-data share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from modalities_core.files import checksum
from modalities_data.lorem import lorem_document
from modalities_data.manifest import Accounting, Manifest, TokenizerRecord, write_manifest
from modalities_data.megatron_index import token_dtype
from modalities_data.packed import writing_shard
from modalities_data.tokenizers.train import train_tokenizer

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def write_jsonl():
    def write(path: Path, texts) -> Path:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    return write


@pytest.fixture(scope="session")
def lorem_file(tmp_path_factory, write_jsonl) -> Path:
    """400 documents with some non-ASCII text, about 250 kB."""
    texts = [lorem_document(7, number) + ("ünï 中文 \U0001f600" if number % 5 == 0 else "") for number in range(400)]
    return write_jsonl(tmp_path_factory.mktemp("lorem") / "lorem.jsonl", texts)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> Path:
    """A byte-level BPE of 600 ids."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    assert train_tokenizer((lorem_document(3, number) for number in range(200)), path, 600) == 600
    return path


@pytest.fixture(scope="session")
def write_folder():
    """A packed folder from token ids: shards of documents, each a list of ids; with the same of masks where given."""

    def write(folder: Path, shards, masks=None, vocab_size: int = 500, end_of_document: int = 0) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        made = []
        for number, documents in enumerate(shards):
            lengths = np.array([len(document) for document in documents])
            mask = None if masks is None or masks[number] is None else np.concatenate(masks[number]).astype(np.uint8)
            origins = None if mask is None else np.arange(len(documents))
            with writing_shard(folder, f"{number:05d}", token_dtype(vocab_size), mask=mask is not None,
                               origins=origins is not None) as writer:  # fmt: skip
                writer.append(np.concatenate(documents).astype(np.uint32), lengths, 0, mask, origins)
            made.append(writer.shard(checksum(folder / f"{number:05d}.idx")))
        counts = {name: sum(getattr(shard, name) for shard in made) for name in ("tokens", "documents", "text_bytes")}
        write_manifest(folder, Manifest(
            dtype=token_dtype(vocab_size), vocab_size=vocab_size, largest_id=max(shard.largest_id for shard in made),
            end_of_document=end_of_document, tokenizer=TokenizerRecord("x", "bytes", ""), shards=made, producer="test",
            accounting=Accounting(counts["documents"], counts["documents"]), options={}, **counts,
        ))  # fmt: skip
        return folder

    return write


@pytest.fixture(scope="session")
def command():
    """Run ``modalities-data`` in a process of its own."""

    def run(*arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "modalities_data", *map(str, arguments)],
            capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT,
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def script():
    """Run Python code in a process of its own."""

    def run(code: str, *arguments: object, timeout: float = 120, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True, text=True, timeout=timeout, env={**ENVIRONMENT, **variables},
        )  # fmt: skip

    return run
