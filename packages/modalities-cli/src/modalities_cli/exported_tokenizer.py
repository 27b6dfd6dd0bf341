"""The tokenizer and the chat template of a run, written for transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modalities_core.config.graph import Graph

BYTES_END = "<|endoftext|>"
SAMPLES = ("Hello, world!", "def f(x):\n    return x + 1\n", "naïve 北京 🙂  two  spaces", "1234567.89")


@dataclass(frozen=True, slots=True)
class Written:
    """Token ids for config.json and generation_config.json, and what a user should know."""

    ids: dict[str, int | list[int]]
    warnings: tuple[str, ...] = ()


def write_run_tokenizer(folder: Path, graph: Graph, run: Path, model: Any, chat_template: Path | None) -> Written:
    """Write the tokenizer that the run's document names, and its chat template.

    Args:
        folder: where to.
        graph: of the run.
        run: its folder.
        model: for its sequence length.
        chat_template: a file to take instead of the run's own.

    Raises:
        ConfigError: ``chat_template`` is none.
        CheckpointError: transformers reads another tokenizer out of what was written.
    """
    from modalities_data.tokenizers.bytes import BytesTokenizer
    from modalities_data.tokenizers.huggingface import HuggingFaceTokenizer
    from modalities_models.huggingface.tokenizer import byte_tokenizer, write_tokenizer

    tokenizer = graph.build("tokenizer")
    if tokenizer is None:
        return Written({}, ("the run's document names no `tokenizer`, so none was exported",))
    end = tokenizer.end_of_document
    if isinstance(tokenizer, BytesTokenizer):
        content, end_token = byte_tokenizer(BYTES_END, end), BYTES_END
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        content, end_token = tokenizer.text, tokenizer.end_of_document_token
    else:
        return _as_it_is(folder, tokenizer)
    places = [run, *_folders(graph)]
    template = _template(places, chat_template)
    ids = write_tokenizer(folder, content, end_token, end, model.sequence_length, template, _settings(places))
    _check(folder, tokenizer)
    return Written(ids)


def _as_it_is(folder: Path, tokenizer: Any) -> Written:
    """The file of a tokenizer that is no tokenizer.json."""
    if not hasattr(tokenizer, "save"):
        return Written({}, (f"a {type(tokenizer).__name__} cannot be written, so no tokenizer was exported",))
    before = set(folder.iterdir())
    tokenizer.save(folder)
    names = ", ".join(sorted(path.name for path in set(folder.iterdir()) - before))
    ids: dict[str, int | list[int]] = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.end_of_document)
    why = f"the run's tokenizer is no tokenizer.json: its own file was copied ({names}), which needs its own library"
    return Written(ids, (why,))


def _folders(graph: Graph) -> list[Path]:
    """Folders that the document names by `path`, the tokenizer's first: where a chat template may lie."""
    found: list[Path] = []
    keys = sorted((path for path in graph.document.positions if path and path[-1] == "path"), key=_tokenizer_first)
    for key in keys:
        value = graph.build(".".join(map(str, key)))
        if isinstance(value, str | Path):
            place = graph.document.folder / Path(value).expanduser()
            found.append(place if place.is_dir() else place.parent)
    return list(dict.fromkeys(found))


def _tokenizer_first(path: tuple[str | int, ...]) -> bool:
    return path[0] != "tokenizer"


def _template(places: list[Path], given: Path | None) -> str | None:
    """The text of the chat template, or None if there is none.

    Raises:
        ConfigError: the file that was given holds none.
    """
    from modalities_core.errors import ConfigError
    from modalities_data.prepare.chat_template import read_template

    if given is not None:
        return read_template(given).source
    for place in places:
        try:
            return read_template(place).source
        except ConfigError:
            continue
    return None


def _settings(places: list[Path]) -> dict[str, Any]:
    """The tokenizer_config.json that came with the run's tokenizer, if one did."""
    for place in places:
        try:
            values = json.loads((place / "tokenizer_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(values, dict):
            return values
    return {}


def _check(folder: Path, tokenizer: Any) -> None:
    """Make sure that transformers, where it is installed, gives the ids of the run behind the start of a document.

    Raises:
        CheckpointError: it gives others.
    """
    from modalities_core.errors import CheckpointError

    try:
        from transformers import AutoTokenizer
    except ImportError:
        return
    theirs: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    for text in SAMPLES:
        ours, found = [tokenizer.end_of_document, *tokenizer.encode(text)], list(theirs(text)["input_ids"])
        if ours != found:
            raise CheckpointError(
                f"the exported tokenizer gives other ids than the run's for {text!r}: {found[:8]}, not {ours[:8]}",
                hint="this is a bug in the export, please report it with the tokenizer.json",
            )
