"""A corpus of distinct text that is on any machine: Python sources and documentation, exact-deduplicated, shuffled.

Tokenizer engines cache what they have seen, so repeated documents would flatter the fast ones. Every document is there
once; a document that contains the end-of-document token is left out, because tools disagree on what that means.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import msgspec

SUFFIXES = {".py", ".pyi", ".rst", ".txt", ".md", ".html"}
LARGEST_FILE = 1 << 20
END_OF_DOCUMENT = "<|endoftext|>"


def default_folders() -> list[Path]:
    """The running interpreter's library and packages, those of its base, and the system's documentation."""
    paths = sysconfig.get_paths()
    base = Path(sys.base_prefix) / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    system = [Path("/usr/share/doc"), Path("/usr/share/perl"), Path("/usr/lib/python3")]
    wanted = [Path(paths["stdlib"]), base, Path(paths["purelib"]), *system]
    return [folder for folder in dict.fromkeys(wanted) if folder.is_dir()]


def documents(folders: Sequence[Path]) -> Iterator[str]:
    """The text of every different file, in an order that depends on names alone."""
    seen = set()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix not in SUFFIXES or path.is_symlink() or not path.is_file():
                continue
            content = path.read_bytes()
            identity = hashlib.blake2b(content, digest_size=16).digest()
            if len(content) > LARGEST_FILE or identity in seen:
                continue
            seen.add(identity)
            try:
                text = content.decode()
            except UnicodeDecodeError:
                continue
            if text.strip() and END_OF_DOCUMENT not in text:
                yield text


def make(cache: Path, megabytes: int, seed: int = 0, more_folders: Sequence[Path] = ()) -> tuple[Path, dict]:
    """A JSONL file of about ``megabytes`` million bytes of text, made once.

    Returns:
        the file, and what it has: documents, text_bytes, file_bytes and sha256.
    """
    path = cache / f"corpus-{megabytes}-{seed}.jsonl"
    facts_path = path.with_suffix(".json")
    if not facts_path.is_file():
        print(f"making {path.name} ...", file=sys.stderr, flush=True)
        texts = list(documents([*default_folders(), *more_folders]))
        random.Random(seed).shuffle(texts)
        _write(path, texts, megabytes * 10**6)
        facts_path.write_text(json.dumps(_facts(path)))
    return path, json.loads(facts_path.read_text())


def stretched(cache: Path, megabytes: int, seed: int = 0) -> tuple[Path, dict]:
    """A JSONL file as ``make`` gives it, made once, also where this machine has less text than that.

    What is missing are documents of the lines of all others in another order: as distinct as documents, though not as
    words, which is enough to see whether memory grows.

    Returns:
        the file, and what it has: the facts of ``make`` and mixed_documents.
    """
    path = cache / f"stretched-{megabytes}-{seed}.jsonl"
    facts_path = path.with_suffix(".json")
    if not facts_path.is_file():
        print(f"making {path.name} ...", file=sys.stderr, flush=True)
        texts = list(documents(default_folders()))
        random.Random(seed).shuffle(texts)
        real, wanted = sum(len(text.encode()) for text in texts), megabytes * 10**6
        mixed = _mixed(texts, max(0, wanted - real), seed)
        _write(path, chain(texts, mixed), wanted)
        facts = _facts(path)
        facts_path.write_text(json.dumps({**facts, "mixed_documents": max(0, facts["documents"] - len(texts))}))
    return path, json.loads(facts_path.read_text())


def _mixed(texts: Sequence[str], wanted: int, seed: int) -> Iterator[str]:
    """At least ``wanted`` bytes of documents of 100 lines each, drawn from all over."""
    generator = random.Random(seed)
    written = 0
    while written < wanted:
        lines = [generator.choice(texts).partition("\n")[0] for _ in range(10)]
        while len(lines) < 100:
            text = generator.choice(texts)
            start = generator.randrange(len(text))
            lines += text[start : start + 2000].split("\n")[1:-1]
        text = "\n".join(lines)
        written += len(text.encode())
        yield text


def _write(path: Path, texts: Iterable[str], wanted: int) -> None:
    written = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        for text in texts:
            if written >= wanted:
                return
            stream.write(msgspec.json.encode({"text": text}) + b"\n")
            written += len(text.encode())
    if written < wanted:
        found = written // 10**6
        raise SystemExit(f"error: this machine has only {found} MB of text; add folders with --text, or ask for less")


def _facts(path: Path) -> dict:
    count = size = 0
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for line in stream:
            count += 1
            size += len(msgspec.json.decode(line)["text"].encode())
            digest.update(line)
    return {"documents": count, "text_bytes": size, "file_bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def beginnings(path: Path, output: Path, count: int, characters: int) -> Path:
    """A file of the beginnings of the first ``count`` documents, to see what starting costs."""
    with path.open("rb") as stream:
        texts = [json.loads(line)["text"][:characters] for line, _ in zip(stream, range(count), strict=False)]
    output.write_bytes(b"".join(msgspec.json.encode({"text": text}) + b"\n" for text in texts))
    return output


def parts(path: Path, folder: Path, count: int) -> Path:
    """The file cut at newlines into ``count`` files of similar size, for tools that parallelize over files."""
    folder.mkdir(parents=True, exist_ok=True)
    size = path.stat().st_size
    there = [part.stat().st_size for part in folder.glob("*.jsonl")]
    if len(there) == count and sum(there) == size:
        return folder
    with path.open("rb") as stream:
        for number in range(count):
            with (folder / f"{number:05d}.jsonl").open("wb") as part:
                while stream.tell() < size * (number + 1) // count:
                    part.write(stream.readline())
    return folder
