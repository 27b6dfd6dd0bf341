"""From and to the ``.ds`` files of datatrove.

``NAME.ds`` are raw tokens of 2 or 4 bytes, unsigned and little-endian; ``NAME.ds.index`` is the end of every document
in tokens, u64; ``NAME.ds.loss``, where there is one, a byte per token; ``NAME.ds.metadata`` three lines: the tokenizer
and the bytes per token, and the count of tokens twice.
Source: https://github.com/huggingface/datatrove, src/datatrove/pipeline/tokens/tokenizer.py.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from modalities_core.errors import ConfigError, DataError
from modalities_core.files import replacing, sync_folder, write_text
from modalities_data.convert.raw import RawTokens, Vocabulary
from modalities_data.convert.shards import link_or_copy, write_converted
from modalities_data.disk import user_errors
from modalities_data.manifest import Manifest
from modalities_data.packed import PackedFolder
from modalities_data.prepare.folder import STATE_FOLDER, partial_folder
from modalities_data.prepare.rewrite import OnProgress, making_folder
from modalities_data.terminal import amount

SUFFIXES = (".ds", ".ds.index", ".ds.metadata", ".ds.loss")


def from_datatrove(
    sources: Sequence[Path],
    output: Path,
    vocabulary: Vocabulary,
    *,
    append_end: bool = False,
    copy: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress = lambda done, total, tokens: None,
) -> Manifest:
    """Make a packed folder of ``.ds`` files, one linked shard each; their losses become masks.

    Args:
        sources: ``.ds`` files, or folders of them, which are sorted by name.
        output: the folder to make.
        vocabulary: what the ids mean.
        append_end: put the end-of-document id where a document lacks it; the file is then rewritten.
        copy: never link.
        overwrite: replace an existing packed folder.
        on_progress: told about progress.

    Raises:
        ConfigError: there is no source.
        DataError: a file is damaged or lacks its index, or an id is not in the vocabulary.
    """
    if not sources:
        raise ConfigError("there is no file to convert")
    files: list[Path] = []
    for source in map(Path, sources):
        found = sorted(source.rglob("*.ds")) if source.is_dir() else [source]
        if not found:
            raise DataError(f"{source} has no .ds file")
        files += found
    used = [path for file in files for path in (file, _beside(file, "index"), _beside(file, "loss")) if path.is_file()]
    return write_converted(
        [_read(file) for file in files], output, vocabulary, options={"command": "convert from-datatrove"},
        inputs=used, append_end=append_end, copy=copy, overwrite=overwrite, on_progress=on_progress,
    )  # fmt: skip


def to_datatrove(folder: Path, output: Path, *, copy: bool = False, overwrite: bool = False) -> Manifest:
    """Write every shard of a packed folder as a ``.ds`` file with its index, into the folder ``output``.

    Tokens and masks are linked; the tokenizer's files come along.

    Args:
        folder: a packed folder.
        output: the folder to make.
        copy: never link.
        overwrite: replace an existing folder, if it holds nothing but such files.

    Raises:
        DataError: the folder is damaged, or the output exists.
        ResourceError: the disk is full.
    """
    packed = PackedFolder(folder)
    output = Path(os.path.abspath(output))
    _check_replaceable(output, overwrite)
    with user_errors(output):
        partial = partial_folder(output)
        with making_folder(partial, {"started": time.time_ns()}):
            for number in range(len(packed.manifest.shards)):
                _write(packed, number, partial, copy)
            for file in packed.folder.glob("tokenizer.*"):
                shutil.copyfile(file, partial / file.name)
            shutil.rmtree(partial / STATE_FOLDER)
            (partial / ".lock").unlink()
            sync_folder(partial)
            if output.exists():
                shutil.rmtree(output)
            partial.rename(output)
        sync_folder(output.parent)
    return packed.manifest


def _beside(file: Path, suffix: str) -> Path:
    return file.with_name(f"{file.name}.{suffix}")


def _read(file: Path) -> RawTokens:
    """A file and its index; bytes per token follow from the two."""
    index = _beside(file, "index")
    with user_errors(file):
        size = file.stat().st_size
    with user_errors(index):
        content = index.read_bytes()
    if len(content) % 8 or not content:
        raise DataError(f"{index}: an index has 8 bytes per document, this file has {len(content)}")
    ends = np.frombuffer(content, "<u8")
    tokens = int(ends[-1])
    itemsize = size // tokens if tokens else 0
    if itemsize not in (2, 4) or size != tokens * itemsize or np.any(ends[1:] < ends[:-1]):
        raise DataError(f"{index}: its documents end at {tokens} tokens, {file.name} has {size} bytes")
    ends = ends.astype(np.int64)
    lengths = np.diff(ends, prepend=0)
    loss = _beside(file, "loss")
    if not loss.is_file():
        loss = None
    elif loss.stat().st_size != tokens:
        raise DataError(f"{loss}: expected a byte for each of {tokens} tokens, the file has {loss.stat().st_size}")
    return RawTokens(file, 0, np.dtype(f"<u{itemsize}"), tokens, ends - lengths, lengths, loss)


def _write(packed: PackedFolder, number: int, folder: Path, copy: bool) -> None:
    """One shard."""
    shard = packed.manifest.shards[number]
    file = folder / f"{shard.name}.ds"
    link_or_copy(packed.folder / f"{shard.name}.bin", file, copy)
    with replacing(_beside(file, "index")) as stream:
        stream.write(np.cumsum(packed.index(number).lengths, dtype="<u8").data)
    if shard.mask is not None:
        link_or_copy(packed.folder / f"{shard.name}.mask", _beside(file, "loss"), copy)
    # Its reader takes the bytes per token from behind the bar.
    name = f"tokenizer.json|{packed.dtype.itemsize}"
    write_text(_beside(file, "metadata"), f"{name}\n{shard.tokens}\n{amount(shard.tokens, 'T')}")


def _check_replaceable(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not overwrite:
        raise DataError(f"{output} exists already", hint="choose another name, or pass --overwrite to replace it")
    if not output.is_dir() or any(
        not (entry.name.endswith(SUFFIXES) or entry.name.startswith("tokenizer.")) for entry in output.iterdir()
    ):
        raise DataError(f"{output} holds other files than datatrove's, so --overwrite does not replace it")
