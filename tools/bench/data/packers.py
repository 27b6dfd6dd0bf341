"""How each tool is told to pack a JSONL file, and where its tokens lie afterwards.

Every tool appends the end-of-document token and is otherwise left at its defaults. datatrove's shuffling of documents
is off, so that the order of documents is the same for all.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from corpus import END_OF_DOCUMENT, parts
from environments import Environment, Made

DRIVERS = Path(__file__).parent / "drivers"
CHUNK = 16 << 20

ORIGINAL = Environment(
    "original",
    (
        ("torch==2.13.0",),
        ("--no-deps", "modalities==0.5.0"),
        ("jq",),
        # What it imports, and a transformers below 5: it imports a module that 5 no longer has.
        ("numpy", "packaging", "tqdm", "pyyaml", "transformers<5", "datasets", "protobuf", "SentencePiece", "rich",
         "omegaconf", "pydantic", "click", "click_pathlib", "class_resolver", "matplotlib", "wandb", "einops",
         "debugpy"),
    ),
    ("modalities", "torch", "transformers", "tokenizers"),
)  # fmt: skip
DATATROVE = Environment(
    "datatrove", (("datatrove", "orjson", "tokenizers", "numpy"),), ("datatrove", "tokenizers", "numpy")
)
MEGATRON = Environment(
    "megatron",
    (("torch==2.13.0",), ("triton",), ("numpy", "packaging", "transformers", "pybind11", "sentencepiece", "tiktoken",
                                       "omegaconf", "gigatoken")),
    ("torch", "transformers", "tokenizers", "gigatoken"),
)  # fmt: skip
PLAIN = Environment("plain", (("tokenizers", "msgspec", "numpy"),), ("tokenizers", "numpy"))


@dataclass(frozen=True)
class Job:
    """One packing.

    source: the JSONL file.
    output: a folder that exists and is empty.
    tokenizer: a folder with tokenizer.json and tokenizer_config.json.
    workers: processes that tokenize.
    """

    source: Path
    output: Path
    tokenizer: Path
    workers: int


@dataclass(frozen=True)
class Packer:
    """A tool: its environment (None is ours), its commands, and its tokens as bytes."""

    environment: Environment | None
    commands: Callable[[Job, Made], list[list[str]]]
    tokens: Callable[[Job], Iterator[bytes]]


def write_tokenizer_config(folder: Path) -> None:
    """What transformers wants beside a tokenizer.json."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_DOCUMENT, "unk_token": END_OF_DOCUMENT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def packers(megatron: Path | None) -> dict[str, Packer]:
    """Every tool by name; Megatron-LM's where its repository is given."""
    found = {
        "modalities (fastokens)": Packer(None, _ours("fastokens"), _our_tokens),
        "modalities (tokenizers)": Packer(None, _ours("tokenizers"), _our_tokens),
        "plain encode_batch_fast": Packer(PLAIN, _plain, lambda job: _file(job.output / "tokens.bin")),
        "original modalities 0.5.0": Packer(ORIGINAL, _original, _original_tokens),
        "datatrove": Packer(DATATROVE, _datatrove, _datatrove_tokens),
    }
    if megatron is not None:
        found |= {
            "Megatron-LM preprocess_data.py": Packer(MEGATRON, _megatron(megatron), _megatron_tokens),
            "Megatron-LM preprocess_data_fast.py": Packer(MEGATRON, _megatron(megatron, fast=True), _megatron_tokens),
        }
    return found


def _file(path: Path, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    with path.open("rb") as stream:
        stream.seek(start)
        left = (path.stat().st_size if end is None else end) - start
        while left and (chunk := stream.read(min(CHUNK, left))):
            left -= len(chunk)
            yield chunk


def _ours(engine: str) -> Callable[[Job, Made], list[list[str]]]:
    def commands(job: Job, made: Made) -> list[list[str]]:
        return [[
            made.python, "-m", "modalities_data", "pack", str(job.source), str(job.output / "packed"),
            "--tokenizer", str(job.tokenizer / "tokenizer.json"), "--engine", engine, "--workers", str(job.workers),
        ]]  # fmt: skip

    return commands


def _our_tokens(job: Job) -> Iterator[bytes]:
    for path in sorted((job.output / "packed").glob("*.bin")):
        yield from _file(path)


def _plain(job: Job, made: Made) -> list[list[str]]:
    tokens = job.output / "tokens.bin"
    return [[
        made.python, str(DRIVERS / "plain_tokenizers.py"), str(job.source), str(tokens),
        str(job.tokenizer / "tokenizer.json"), END_OF_DOCUMENT,
    ]]  # fmt: skip


def _original(job: Job, made: Made) -> list[list[str]]:
    index, config = job.output / "corpus.idx", job.output / "pack.yaml"
    settings = {
        "settings": {
            "src_path": str(job.source), "dst_path": str(job.output / "tokens.pbin"), "index_path": str(index),
            "jq_pattern": ".text", "num_cpus": job.workers, "eod_token": END_OF_DOCUMENT,
            "processing_batch_size": 10, "raw_samples_queue_size": 300, "processed_samples_queue_size": 300,
        },
        "tokenizer": {
            "component_key": "tokenizer", "variant_key": "pretrained_hf_tokenizer",
            "config": {"pretrained_model_name_or_path": str(job.tokenizer)},
        },
    }  # fmt: skip
    config.write_text(json.dumps(settings))  # JSON is YAML
    program = made.script("modalities")
    return [
        [program, "data", "create_raw_index", str(job.source), "--index_path", str(index)],
        [program, "data", "pack_encoded_data", str(config)],
    ]


def _original_tokens(job: Job) -> Iterator[bytes]:
    path = job.output / "tokens.pbin"
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
    return _file(path, 12, 12 + length)


def _datatrove(job: Job, made: Made) -> list[list[str]]:
    # It parallelizes over files, so it gets one per worker.
    source = parts(job.source, job.source.with_name(f"{job.source.stem}.{job.workers}-parts"), job.workers)
    return [[
        made.python, str(DRIVERS / "datatrove_pack.py"), str(source), str(job.output),
        str(job.tokenizer / "tokenizer.json"), END_OF_DOCUMENT, str(job.workers),
    ]]  # fmt: skip


def _datatrove_tokens(job: Job) -> Iterator[bytes]:
    for path in sorted((job.output / "tokens").glob("*.ds")):
        yield from _file(path)


def _megatron(repository: Path, fast: bool = False) -> Callable[[Job, Made], list[list[str]]]:
    def commands(job: Job, made: Made) -> list[list[str]]:
        script = "preprocess_data_fast.py" if fast else "preprocess_data.py"
        more = ["--use-gigatoken"] if fast else ["--workers", str(job.workers), "--log-interval", "1000000"]
        return [[
            made.python, str(DRIVERS / "run_in_megatron.py"), str(repository), f"tools/{script}",
            "--input", str(job.source), "--output-prefix", str(job.output / "tokens"), "--append-eod",
            "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(job.tokenizer), *more,
        ]]  # fmt: skip

    return commands


def _megatron_tokens(job: Job) -> Iterator[bytes]:
    return _file(job.output / "tokens_text_document.bin")


def ours() -> Made:
    """This interpreter, which has modalities-data."""
    from environments import versions

    return Made(sys.executable, versions(sys.executable, ("modalities-data", "tokenizers", "fastokens", "numpy")))
