"""Keeping the documents that pass every rule, of a packed folder or of files with text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec
import numpy as np
import xxhash

from modalities_core.errors import ConfigError, DataError
from modalities_core.files import replacing
from modalities_core.interfaces import Tokenizer
from modalities_data.disk import refuse_existing, user_errors
from modalities_data.inputs.files import Sources, find_inputs
from modalities_data.inputs.reading import failure_error, read
from modalities_data.inputs.units import whole_pieces
from modalities_data.jsonl import Block
from modalities_data.manifest import Accounting, Input, Manifest
from modalities_data.prepare.joined import JoinedFolders, in_blocks
from modalities_data.prepare.lines import LinesRecord, refuse_same, write_record
from modalities_data.prepare.rewrite import SHARD_TOKENS, OnProgress, is_packed, write_documents
from modalities_data.tokenizers.opening import recorded_tokenizer

GROUP = "modalities.predicates"
"""The entry-point group that gives predicates their names."""


class Document:
    """What a predicate decides about; what it does not ask for is not computed."""

    def __init__(
        self, text: Callable[[], str], tokens: Callable[[], int], fields: Callable[[], dict[str, Any]]
    ) -> None:
        self._text, self._tokens, self._fields = text, tokens, fields

    @cached_property
    def text(self) -> str:
        """The text; of a packed document, its tokens decoded."""
        return self._text()

    @cached_property
    def tokens(self) -> int:
        """How many tokens it has, without the end-of-document id."""
        return self._tokens()

    @cached_property
    def fields(self) -> dict[str, Any]:
        """Every key of the JSON object."""
        return self._fields()


Predicate = Callable[[Document], bool]
"""Whether to keep a document."""


def filter_documents(
    source: Sources,
    output: Path,
    predicates: Predicate | Mapping[str, Predicate],
    *,
    key: str = "text",
    tokenizer: Tokenizer | None = None,
    on_error: Literal["fail", "skip"] = "fail",
    options: dict[str, Any] | None = None,
    shard_tokens: int = SHARD_TOKENS,
    overwrite: bool = False,
    on_progress: OnProgress = lambda done, total, tokens: None,
) -> Manifest | LinesRecord:
    """Write the documents of ``source`` that pass every predicate to ``output``, in their order.

    Args:
        source: a packed folder, or files, folders, patterns or addresses as ``inputs.files.find_inputs`` takes them.
        output: a packed folder to make, or a JSONL file with unchanged lines and a record beside it.
        predicates: by the name of the rule a document is counted under that it is the first to refuse.
        key: of the text in JSON Lines or Parquet.
        tokenizer: counts the tokens of documents in files where a predicate asks for them.
        on_error: whether a record that is no document ends the job or is counted as failed.
        options: for the manifest.
        shard_tokens: tokens per shard of a packed folder, at least.
        overwrite: replace an existing output.
        on_progress: told about progress.

    Returns:
        The manifest of the folder, or the record of the file.

    Raises:
        ConfigError: a predicate asks for what there is not: tokens without a tokenizer, fields of packed documents.
        DataError: the source is damaged, the output exists, or no document is left.
    """
    rules = dict(predicates) if isinstance(predicates, Mapping) else {_name(predicates): predicates}
    if not rules:
        raise ConfigError("there is no rule to filter by", hint="see `modalities-data filter --help`")
    options = {"command": "filter", "rules": sorted(rules)} | (options or {})
    if isinstance(source, str | Path) and is_packed(Path(source)):
        return _filter_folder(Path(source), output, rules, options, shard_tokens, overwrite, on_progress)
    return _filter_lines(source, output, rules, key, tokenizer, on_error, options, overwrite, on_progress)


def _filter_folder(
    source: Path, output: Path, rules: dict[str, Predicate], options: dict[str, Any], shard_tokens: int,
    overwrite: bool, on_progress: OnProgress,
) -> Manifest:  # fmt: skip
    joined = JoinedFolders([source])
    (packed,) = joined.folders
    tokenizer: Tokenizer | None = None
    skipped: Counter[str] = Counter()

    def decoded(tokens: np.ndarray) -> str:
        nonlocal tokenizer
        if tokenizer is None:
            tokenizer = recorded_tokenizer(packed.folder, packed.manifest.tokenizer)
        return tokenizer.decode(tokens[:-1].tolist())

    def kept() -> Iterator[np.ndarray]:
        for numbers in in_blocks(0, joined.documents):
            refused = [
                _refusal(rules, Document(lambda ids=ids: decoded(ids), lambda ids=ids: len(ids) - 1, _no_fields))
                for batch in joined.batches([numbers])
                for ids in np.split(batch.tokens, np.cumsum(batch.lengths)[:-1])
            ]
            skipped.update(rule for rule in refused if rule)
            passed = numbers[[rule is None for rule in refused]]
            if len(passed):
                yield passed

    return write_documents(
        joined, kept(), output, options=options, shard_tokens=shard_tokens, overwrite=overwrite,
        on_progress=on_progress, accounting=lambda written: Accounting(joined.documents, written, _sorted(skipped)),
    )  # fmt: skip


def _filter_lines(
    sources: Sources, output: Path, rules: dict[str, Predicate], key: str, tokenizer: Tokenizer | None,
    on_error: str, options: dict[str, Any], overwrite: bool, on_progress: OnProgress,
) -> LinesRecord:  # fmt: skip
    refuse_existing(output, overwrite)
    files = find_inputs(sources)
    for file in files:
        refuse_same(file, output)
    total = sum(file.bytes for file in files)
    done, accounting, inputs = 0, Accounting(), []
    with user_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as stream:
            for piece in whole_pieces(files, key):
                digest = xxhash.xxh3_64()
                for block in read(piece, key, digest):
                    if block.failures and on_error == "fail":
                        raise failure_error(piece, block, block.failures[0])
                    accounting += _filter_block(block, rules, key, tokenizer, stream)
                    done += block.bytes
                    on_progress(done, total, 0)
                inputs.append(Input(piece.file, piece.bytes, digest.hexdigest()))
            if not accounting.written:
                raise DataError(f"no document is left to write: {accounting}")
        return write_record(output, inputs, options, accounting)


def _filter_block(
    block: Block, rules: dict[str, Predicate], key: str, tokenizer: Tokenizer | None, stream: BinaryIO
) -> Accounting:
    """Write what passes, and count."""
    skipped: Counter[str] = Counter()
    lines = block.lines or [msgspec.json.encode({key: text}) for text in block.texts]
    for line, text in zip(lines, block.texts, strict=True):
        refused = _refusal(rules, _line_document(line, text, tokenizer))
        if refused is None:
            stream.write(line + b"\n")
        else:
            skipped[refused] += 1
    documents, failed = len(block.texts), len(block.failures)
    return Accounting(documents + failed, documents - skipped.total(), _sorted(skipped), failed, block.blank_lines)


def _line_document(line: bytes, text: str, tokenizer: Tokenizer | None) -> Document:
    def tokens() -> int:
        if tokenizer is None:
            raise ConfigError("tokens of text are counted by a tokenizer", hint="pass --tokenizer")
        return len(tokenizer.encode(text))

    return Document(lambda: text, tokens, lambda: msgspec.json.decode(line))


def _no_fields() -> dict[str, Any]:
    raise ConfigError(
        "a packed folder keeps no fields of its documents", hint="filter the JSONL file it was packed from"
    )


def _refusal(rules: dict[str, Predicate], document: Document) -> str | None:
    """The first rule that refuses the document."""
    return next((name for name, keeps in rules.items() if not keeps(document)), None)


def _name(predicate: Predicate) -> str:
    return getattr(predicate, "__name__", type(predicate).__name__)


def _sorted(skipped: Counter[str]) -> dict[str, int]:
    return dict(sorted(skipped.items()))


def min_tokens(limit: int) -> Predicate:
    """At least ``limit`` tokens."""
    return lambda document: document.tokens >= limit


def max_tokens(limit: int) -> Predicate:
    """At most ``limit`` tokens."""
    return lambda document: document.tokens <= limit


def contains(texts: tuple[str, ...]) -> Predicate:
    """Each of ``texts`` occurs."""
    return lambda document: all(text in document.text for text in texts)


def not_contains(texts: tuple[str, ...]) -> Predicate:
    """None of ``texts`` occurs."""
    return lambda document: not any(text in document.text for text in texts)


def key_equals(key: str, value: str) -> Predicate:
    """The field ``key`` is ``value``, as text or as JSON; dots reach into nested objects."""
    try:
        accepted = [value, msgspec.json.decode(value)]
    except msgspec.DecodeError:
        accepted = [value]

    def keeps(document: Document) -> bool:
        found: Any = document.fields
        for name in (key,) if key in found else key.split("."):
            if not isinstance(found, dict) or name not in found:
                return False
            found = found[name]
        return any(found == one and type(found) is type(one) for one in accepted)

    return keeps


def registered(name: str) -> Predicate:
    """The predicate an installed package registered in the entry-point group ``modalities.predicates``.

    Raises:
        ConfigError: none has this name, or it cannot be called.
    """
    known = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in known:
        there = f"there are: {', '.join(sorted(known))}" if known else f"no installed package registers any in {GROUP}"
        raise ConfigError(f"there is no predicate {name!r}", hint=there)
    try:
        found = known[name].load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the predicate {name!r} does not load: {error}") from error
    if not callable(found):
        raise ConfigError(f"the predicate {name!r} is {found!r}, which cannot be called")
    return found
