"""Text that is at hand without a network: the standard library of the running interpreter, and made-up sentences."""

from __future__ import annotations

import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import xxhash

from modalities_core.errors import DataError
from modalities_core.files import replacing
from modalities_data.disk import user_errors
from modalities_data.lorem import lorem_document
from modalities_data.order import check_seed

EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
# Generated tables: so regular that a small model would learn little else.
TABLE_FOLDERS = ("encodings/",)


class CorpusReport(NamedTuple):
    """What was written, and what was left out by which rule."""

    documents: int
    text_bytes: int
    skipped: dict[str, int]


def write_standard_library(output: Path) -> CorpusReport:
    """Write the Python sources of the running interpreter's standard library as JSON Lines, about 30 MB.

    One object per file, ``{"text": ..., "source": path in the library}``, sorted by path. Files that are empty, not
    UTF-8, equal to an earlier one or tables of character sets are left out and counted.

    Raises:
        DataError: this interpreter has no sources.
    """
    skipped: Counter[str] = Counter()
    return _write(output, _standard_library(Path(sysconfig.get_paths()["stdlib"]), skipped), skipped)


def write_lorem(output: Path, documents: int, seed: int = 0) -> CorpusReport:
    """Write ``documents`` made-up texts as JSON Lines, about half a kilobyte each.

    Raises:
        ConfigError: the seed is negative or too large.
    """
    check_seed(seed)
    return _write(output, ((lorem_document(seed, number), f"lorem/{seed}/{number}") for number in range(documents)), {})


def _standard_library(root: Path, skipped: Counter[str]) -> Iterator[tuple[str, str]]:
    """Text and path of every different source file."""
    seen = set()
    files = [(file.relative_to(root).as_posix(), file) for file in root.rglob("*.py")]
    for name, file in sorted(files):
        if EXCLUDED_FOLDERS.intersection(file.relative_to(root).parts) or not file.is_file():
            continue
        with user_errors(file):
            content = file.read_bytes()
        identity = xxhash.xxh3_128_digest(content)
        try:
            text = content.decode()
        except UnicodeDecodeError:
            skipped["not_utf8"] += 1
            continue
        if not text:
            skipped["empty"] += 1
        elif name.startswith(TABLE_FOLDERS):
            skipped["table"] += 1
        elif identity in seen:
            skipped["duplicate"] += 1
        else:
            seen.add(identity)
            yield text, name


def _write(output: Path, documents: Iterable[tuple[str, str]], skipped: dict[str, int]) -> CorpusReport:
    """Write text and source of each document, whole or not at all."""
    count = text_bytes = 0
    encode = msgspec.json.encode
    with user_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as stream:
            for text, source in documents:
                stream.write(encode({"text": text, "source": source}) + b"\n")
                count += 1
                text_bytes += len(text.encode())
            if not count:
                raise DataError("there is no text to write", hint="this interpreter came without its library's sources")
    return CorpusReport(count, text_bytes, dict(sorted(skipped.items())))
