"""Conversations to a packed folder whose mask counts what the assistant says, and nothing else."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO, NamedTuple, get_args

import msgspec
import numpy as np
import xxhash

from modalities_core.errors import ConfigError, DataError
from modalities_core.files import checksum, replacing, write_text
from modalities_data.disk import user_errors
from modalities_data.inputs.files import InputFile, find_inputs
from modalities_data.inputs.streams import Metered, decompressed, open_input
from modalities_data.manifest import Accounting, Input, Manifest, Shard, TokenizerRecord, write_manifest
from modalities_data.megatron_index import token_dtype
from modalities_data.order import check_seed
from modalities_data.packed import writing_shard
from modalities_data.prepare.chat_encoder import ChatEncoder, Encoded
from modalities_data.prepare.chat_template import FILE_NAME, ChatTemplate
from modalities_data.prepare.folder import check_replaceable, give_name, partial_folder, working_folder
from modalities_data.prepare.shards import OnError, shard_name
from modalities_data.prepare.split import Side, check_fraction
from modalities_data.tokenizers.huggingface import HuggingFaceTokenizer

BATCH = 512
READ_BYTES = 1 << 20
SHARD_TOKENS = 1 << 27

OnProgress = Callable[[int, int, int], None]


class ChatReport(NamedTuple):
    """A finished job.

    counted_tokens: tokens that count as targets.
    cut_tokens: tokens that the border of an assistant's turn runs through; they do not count.
    """

    manifest: Manifest
    counted_tokens: int
    cut_tokens: int
    bytes_read: int
    seconds: float


def pack_chat(
    sources: Sequence[str] | str | Path,
    output: Path,
    tokenizer: HuggingFaceTokenizer,
    template: ChatTemplate,
    *,
    on_error: OnError = "fail",
    overwrite: bool = False,
    key: str = "messages",
    side: Side | None = None,
    shard_tokens: int = SHARD_TOKENS,
    on_progress: OnProgress = lambda done, total, tokens: None,
) -> ChatReport:
    """Write every conversation of ``sources`` as a document of the packed folder ``output``.

    Args:
        sources: JSON Lines, plain or compressed: files, folders, patterns or addresses; one conversation per line.
        output: the folder to make; it has its name when it is complete.
        tokenizer: gives the ids.
        template: writes a conversation as text; it goes into the folder.
        on_error: ``fail`` at the first line that is no conversation, or ``skip`` it and list it in a file.
        overwrite: replace an existing packed folder when the new one is complete.
        key: the JSON key that holds the list of messages.
        side: write only this side of a split; the other one's conversations are counted as skipped.
        shard_tokens: tokens per shard, at least.
        on_progress: told bytes done, bytes in all, and tokens written.

    Raises:
        ConfigError: an argument is out of range.
        DataError: the input is damaged or without conversations, or the output exists.
        ResourceError: the disk is full.
    """
    if on_error not in get_args(OnError):
        raise ConfigError(f"on_error is fail or skip, not {on_error!r}")
    if side is not None:
        check_seed(side.seed)
        check_fraction(side.fraction)
    output = Path(os.path.abspath(output))
    check_replaceable(output, overwrite)
    files = find_inputs(sources, "jsonl")
    started = monotonic()
    partial = partial_folder(output)
    identity = {"chat": [file.name for file in files], "started": [os.getpid(), started]}
    with user_errors(partial), working_folder(partial, identity):
        job = _Job(partial, tokenizer, ChatEncoder(tokenizer, template), on_error, key, side, shard_tokens, on_progress)
        job.run(files)
        if not job.shards:
            raise DataError(f"no conversation to write: {job.accounting}")
        tokenizer.save(partial)
        write_text(partial / FILE_NAME, template.source)
        manifest = _manifest(job, template)
        write_manifest(partial, manifest)
        for entry in partial.iterdir():
            if entry.name == ".lock":
                entry.unlink()
            elif entry.is_dir():
                for inner in entry.iterdir():
                    inner.unlink()
                entry.rmdir()
        give_name(partial, output, overwrite)
    return ChatReport(manifest, job.counted, job.cut, sum(file.bytes for file in job.inputs), monotonic() - started)


@dataclass
class _Job:
    """A run over all inputs, and what it has counted."""

    folder: Path
    tokenizer: HuggingFaceTokenizer
    encoder: ChatEncoder
    on_error: OnError
    key: str
    side: Side | None
    shard_tokens: int
    on_progress: OnProgress
    shards: list[Shard] = field(default_factory=list)
    inputs: list[Input] = field(default_factory=list)
    accounting: Accounting = field(default_factory=Accounting)
    counted: int = 0
    cut: int = 0

    def run(self, files: list[InputFile]) -> None:
        """Read batches of lines and write them, a shard after the other."""
        total = sum(file.bytes for file in files)
        with ExitStack() as stack:
            rejected = None
            if self.on_error == "skip":
                rejected = stack.enter_context(replacing(self.folder / "conversations.rejected.jsonl"))
            batches = self._batches(files)
            more = True
            tokens = 0
            while more:
                more = False
                name = shard_name(len(self.shards))
                with writing_shard(self.folder, name, token_dtype(self.tokenizer.vocab_size), mask=True) as writer:
                    for batch, done in batches:
                        self._write(writer, batch, rejected)
                        self.on_progress(done, total, tokens + writer.tokens)
                        if writer.tokens >= self.shard_tokens:
                            more = True
                            break
                tokens += writer.tokens
                if writer.documents:
                    self.shards.append(writer.shard(checksum(self.folder / f"{name}.idx")))
                else:
                    for suffix in ("bin", "idx", "mask"):
                        (self.folder / f"{name}.{suffix}").unlink()
        if rejected is not None and not self.accounting.failed:
            (self.folder / "conversations.rejected.jsonl").unlink()

    def _write(self, writer: Any, batch: list[_Line], rejected: BinaryIO | None) -> None:
        """Encode some lines and append what is to be learned from."""
        read = [(line, self._conversation(line)) for line in batch]
        failed, skipped = 0, Counter[str]()
        if self.side is not None:
            mine = [pair for pair in read if isinstance(pair[1], DataError) or self.side.has(pair[1][0])]
            if len(mine) < len(read):
                skipped["held_out" if self.side.name == "train" else "train"] = len(read) - len(mine)
            read = mine
        good = [found for _, found in read if not isinstance(found, DataError)]
        encoded = iter(self.encoder.encode(good))
        kept: list[Encoded] = []
        for line, found in read:
            result = found if isinstance(found, DataError) else next(encoded)
            if isinstance(result, DataError):
                failed += 1
                self._reject(line, result, rejected)
            elif not result.mask.any():
                skipped["no_assistant"] += 1
            else:
                kept.append(result)
        if kept:
            writer.append(
                np.concatenate([one.ids for one in kept]),
                np.array([len(one.ids) for one in kept], np.int64),
                sum(one.text_bytes for one in kept),
                np.concatenate([one.mask for one in kept]),
            )
        self.counted += sum(int(one.mask.sum()) for one in kept)
        self.cut += sum(one.cut for one in kept)
        self.accounting += Accounting(len(batch), len(kept), dict(skipped), failed)

    def _reject(self, line: _Line, error: DataError, rejected: BinaryIO | None) -> None:
        if rejected is None:
            raise DataError(f"{line.file}:{line.number}: {error.message}", hint=error.hint)
        entry = {"file": line.file, "line": line.number, "reason": error.message}
        rejected.write(msgspec.json.encode(entry) + b"\n")

    def _conversation(self, line: _Line) -> tuple[list[dict[str, Any]], dict[str, Any]] | DataError:
        """The messages of a line, and what else its template may use."""
        try:
            record = msgspec.json.decode(line.content)
        except (ValueError, RecursionError) as error:
            return DataError(f"JSON is malformed: {error}")
        if not isinstance(record, dict) or self.key not in record:
            return DataError(f"expected a JSON object with the key {self.key!r}")
        messages = record[self.key]
        if not isinstance(messages, list) or not messages:
            return DataError(f"{self.key!r} is a list of at least one message")
        if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages):
            return DataError(f"each message of {self.key!r} is an object with a role")
        return messages, {"tools": record["tools"]} if record.get("tools") else {}

    def _batches(self, files: list[InputFile]) -> Iterator[tuple[list[_Line], int]]:
        """Lines that are not blank, some at a time, and how many bytes have been read."""
        done = 0
        for file in files:
            digest = xxhash.xxh3_64()
            batch: list[_Line] = []
            with user_errors(file.name), open_input(file.name) as raw:
                metered = Metered(raw, file.name, digest)
                blank = 0
                for number, content in enumerate(_lines(decompressed(metered, file.name, file.compression)), 1):
                    if content.isspace() or not content:
                        blank += 1
                        continue
                    batch.append(_Line(file.name, number, content))
                    if len(batch) == BATCH:
                        yield batch, done + metered.bytes
                        batch = []
                self.inputs.append(Input(file.name, metered.bytes, digest.hexdigest()))
                self.accounting += Accounting(blank_lines=blank)
                done += metered.bytes
            if batch:
                yield batch, done


class _Line(NamedTuple):
    file: str
    number: int
    content: bytes


def _lines(stream: Any) -> Iterator[bytes]:
    """The lines of a stream, without their ends and a byte order mark."""
    rest, first = b"", True
    while chunk := stream.read(READ_BYTES):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.removeprefix(b"\xef\xbb\xbf") if first else line
            first = False
    if rest:
        yield rest.removeprefix(b"\xef\xbb\xbf") if first else rest


def _manifest(job: _Job, template: ChatTemplate) -> Manifest:
    tokenizer, shards = job.tokenizer, job.shards
    assert job.accounting.balanced() and job.accounting.written == sum(shard.documents for shard in shards)
    return Manifest(
        dtype=token_dtype(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        largest_id=max(shard.largest_id for shard in shards),
        end_of_document=tokenizer.end_of_document,
        tokens=sum(shard.tokens for shard in shards),
        documents=sum(shard.documents for shard in shards),
        text_bytes=sum(shard.text_bytes for shard in shards),
        tokenizer=TokenizerRecord(
            tokenizer.fingerprint, "tokenizers", version("tokenizers"), tokenizer.end_of_document_token
        ),
        accounting=job.accounting,
        shards=shards,
        producer=f"modalities-data {version('modalities-data')}",
        options={
            "key": job.key,
            "on_error": job.on_error,
            "shard_tokens": job.shard_tokens,
            "counted_tokens": job.counted,
            "side": job.side and list(job.side),
            "template": xxhash.xxh3_64_hexdigest(template.source.encode()),
        },
        inputs=job.inputs,
    )
