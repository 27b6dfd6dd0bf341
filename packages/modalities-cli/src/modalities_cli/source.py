"""Something to generate with: a model and its tokenizer, from a run, a checkpoint or a folder of Hugging Face's."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from modalities_core.errors import CheckpointError, ConfigError
from modalities_core.interfaces import Tokenizer

CONFIG = "config.json"
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(slots=True)
class Source:
    """A trained model, ready to write.

    model: a Model, on its device.
    tokenizer: the one it was trained with.
    before: ids that come before every document, as in training.
    added: ids that the tokenizer puts in front of every text that no template wrote.
    empty: ids to begin with where there is nothing else.
    end_tokens: ids that end a text.
    templates: where a chat template may lie, best first.
    """

    model: Any
    tokenizer: Tokenizer
    before: list[int]
    added: list[int]
    empty: list[int]
    end_tokens: set[int]
    templates: list[Path] = field(default_factory=list)

    def prompt(self, text: str) -> list[int]:
        """The ids of a text to go on with."""
        return [*self.before, *self.added, *self.tokenizer.encode(text)] or self.empty

    def stopping(self, stop: tuple[str, ...]) -> tuple[set[int], list[str]]:
        """End tokens and strings for what a user wants to stop at: a control token never shows in the text."""
        ids = {text: self.control_token(text) for text in stop}
        tokens = {token for token in ids.values() if token is not None}
        return self.end_tokens | tokens, [text for text, token in ids.items() if token is None]

    def control_token(self, text: str) -> int | None:
        """The id of the control token that is written ``text``."""
        content = getattr(self.tokenizer, "text", None)
        if content is None:
            return dict(getattr(self.tokenizer, "special_tokens", {})).get(text)
        added = json.loads(content).get("added_tokens") or ()
        return next((entry["id"] for entry in added if entry.get("special") and entry["content"] == text), None)


def open_source(path: Path, device: Device = "auto", precision: Precision = "auto") -> Source:
    """Open a run's folder, one of its checkpoints, or a folder of Hugging Face's.

    Args:
        path: the folder.
        device: where to put the model; auto is a GPU if there is one.
        precision: of the weights; auto leaves them as they are stored.

    Raises:
        ConfigError: it is none of these, or the device is not there.
        CheckpointError: its weights are damaged or missing.
    """
    from modalities_cli.wiring import run_of

    if found := run_of(path):
        source = _from_run(*found, path)
    elif (path / CONFIG).is_file():
        source = _from_hugging_face(path)
    else:
        raise ConfigError(
            f"{path} is not the folder of a run, a checkpoint of one, or a Hugging Face model: it has neither "
            f"config.resolved.yaml nor {CONFIG}",
            hint="`modalities run` makes a run; a model of Hugging Face's is a folder on this machine",
        )
    _place(source.model, device, precision)
    return source


def _from_run(folder: Path, step: int | None, path: Path) -> Source:
    """A run has trained each document behind an end-of-document token, so that is where a prompt belongs."""
    from modalities_cli.wiring import open_run, trained_model

    graph = open_run(folder)
    tokenizer = graph.build("tokenizer")
    if tokenizer is None:
        raise ConfigError(f"the document of {folder} names no `tokenizer`", hint="add one at the top level")
    model, _ = trained_model(graph, folder, step, path.resolve().parent if step is not None else None)
    before = [tokenizer.end_of_document]
    return Source(model, tokenizer, before, [], before, set(before), [folder, *_folder_of_tokenizer(graph)])


def _folder_of_tokenizer(graph: Any) -> list[Path]:
    """Where the file of the run's tokenizer lies, if it has one."""
    node = graph.document.get(("tokenizer",))
    if not isinstance(node, dict) or "path" not in node:
        return []
    place = graph.document.folder / str(graph.build("tokenizer.path"))
    return [place if place.is_dir() else place.parent]


def _from_hugging_face(folder: Path) -> Source:
    import torch

    from modalities_models.decoder import Decoder
    from modalities_models.huggingface.loading import Checkpoint
    from modalities_models.initialization import Scaled

    checkpoint = Checkpoint(folder)
    tokenizer, ends, begin = _tokenizer(folder)
    with torch.device("meta"):
        model = Decoder(checkpoint.architecture, Scaled())
    found = dict(checkpoint.tensors())
    model.load_state_dict(found, assign=True)
    added = _written_in_front(tokenizer)
    return Source(model, tokenizer, [], added, begin or [tokenizer.end_of_document], ends, [folder])


def _tokenizer(folder: Path) -> tuple[Tokenizer, set[int], list[int]]:
    """The tokenizer of a folder, the ids that end a text, and the one that begins it if there is one.

    Raises:
        ConfigError: there is no tokenizer, or nothing says which token ends a text.
    """
    from modalities_data.tokenizers.opening import DEFAULT_END, named_tokenizer

    ids = _numbers(folder, "eos_token_id")
    file = folder / "tokenizer.json"
    end = DEFAULT_END
    if file.is_file():
        from tokenizers import Tokenizer as Library

        library = Library.from_file(str(file))
        end = next((token for token in map(library.id_to_token, ids) if token is not None), DEFAULT_END)
        if library.token_to_id(end) is None:
            raise ConfigError(
                f"nothing in {folder} says which token ends a text",
                hint=f'add "eos_token_id" to its generation_config.json or {CONFIG}',
            )
    tokenizer = named_tokenizer(str(folder), end, "tokenizers" if file.is_file() else "auto")
    return tokenizer, {tokenizer.end_of_document, *ids}, _numbers(folder, "bos_token_id")[:1]


def _numbers(folder: Path, key: str) -> list[int]:
    """Token ids under ``key``; what the file about generation says goes before the model's own."""
    for name in ("generation_config.json", CONFIG):
        path = folder / name
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get(key) if path.is_file() else None
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        numbers = found if isinstance(found, list) else [found]
        if all(isinstance(number, int) for number in numbers):
            return numbers
    return []


def _written_in_front(tokenizer: Any) -> list[int]:
    """The control tokens that a tokenizer.json puts in front of every text, such as a beginning of text."""
    content = getattr(tokenizer, "text", None)
    if content is None:
        return []
    from tokenizers import Tokenizer as Library

    library = Library.from_str(content)
    plain = library.encode("a", add_special_tokens=False).ids
    whole = library.encode("a", add_special_tokens=True).ids
    places = [place for place in range(len(whole)) if whole[place : place + len(plain)] == plain]
    return whole[: places[0]] if places else []


def chosen_device(device: str) -> str:
    """``cpu`` or ``cuda``; auto is a GPU if there is one.

    Raises:
        ConfigError: there is none, but it was asked for.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device on this machine", hint="--device cpu, or leave it out")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def _place(model: Any, device: Device, precision: Precision) -> None:
    import torch

    model.to(device=chosen_device(device), dtype=None if precision == "auto" else getattr(torch, precision))
