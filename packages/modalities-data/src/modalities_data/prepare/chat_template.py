"""Chat templates: a conversation as one text, and which characters of it the assistant wrote.

Templates are Jinja programs that come with a model, so they run in a sandbox: no attribute of Python's internals, no
files, no clock. What the assistant wrote is marked by ``{% generation %}`` blocks where the template has them.
Elsewhere it is found by rendering the conversation up to each of its turns: every such text has to begin the next one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from modalities_core.errors import ConfigError, DataError
from modalities_data.disk import user_errors
from modalities_data.tokenizers.extras import optional

FILE_NAME = "chat_template.jinja"
CONFIG_NAME = "tokenizer_config.json"
BEGIN, END = "\ufdd0", "\ufdd1"
"""Around generated text while it is rendered: two of Unicode's noncharacters, which no text is to contain."""

Messages = list[dict[str, Any]]


class Rendering(NamedTuple):
    """A conversation as text; ``spans`` are the characters of the assistant, first and behind the last, ascending."""

    text: str
    spans: list[tuple[int, int]]


class ChatTemplate:
    """A compiled template.

    Args:
        source: the Jinja text.
        variables: what it may use beside the conversation, such as ``bos_token``.
    """

    def __init__(self, source: str, variables: dict[str, Any] | None = None) -> None:
        """Compile it.

        Raises:
            ConfigError: jinja2 is not installed, or the text is no template.
        """
        environment, self._error = _environment()
        self.source, self._variables = source, variables or {}
        try:
            self._template = environment.from_string(source)
        except self._error as error:
            raise ConfigError(f"the chat template is no valid Jinja template: {error}") from error
        self.has_generation = bool(getattr(environment, "generation_blocks", 0))

    def render(self, messages: Messages, others: dict[str, Any] | None = None) -> Rendering:
        """The text of a whole conversation and the assistant's part in it.

        With ``{% generation %}`` these are exactly the blocks. Without, a turn of the assistant reaches from behind
        the generation prompt to the end of what the template writes for it, end-of-turn token included, white space
        after that token not.

        Args:
            messages: each with ``role`` and ``content``.
            others: further variables of this conversation, such as ``tools``.

        Raises:
            DataError: the template refuses the conversation, or does not write it turn by turn.
        """
        others = others or {}
        _refuse_marks(messages, others)
        if self.has_generation:
            return _without_marks(self._text(messages, others))
        whole = self._text(messages, others)
        spans = []
        for number, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before = self._text(messages[:number], others, prompt=True)
            after = self._text(messages[: number + 1], others)
            if not (after.startswith(before) and whole.startswith(after)):
                raise DataError(
                    f"the template does not write message {number + 1} behind the ones before it",
                    hint="mark what the assistant says with {% generation %} and {% endgeneration %} in the template",
                )
            spans.append((len(before), len(before) + _turn_length(after[len(before) :], message.get("content"))))
        return Rendering(whole, spans)

    def prompt(self, messages: Messages, others: dict[str, Any] | None = None) -> str:
        """The text of a conversation up to where the assistant's next turn begins.

        Args:
            messages: each with ``role`` and ``content``; the last is not the assistant's.
            others: further variables, such as ``tools``.

        Raises:
            DataError: the template refuses the conversation.
        """
        _refuse_marks(messages, others or {})
        return self._text(messages, others or {}, prompt=True).replace(BEGIN, "").replace(END, "")

    def _text(self, messages: Messages, others: dict[str, Any], prompt: bool = False) -> str:
        variables = {**self._variables, **others, "messages": messages, "add_generation_prompt": prompt}
        try:
            return self._template.render(**variables)
        except (self._error, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise DataError(f"the chat template refuses it: {error}") from error


def read_template(path: Path, config: Path | None = None) -> ChatTemplate:
    """The template of a file, with the special tokens of the tokenizer's configuration.

    Args:
        path: a Jinja file, a tokenizer_config.json, or a folder with either.
        config: where to look for ``bos_token`` and the like if ``path`` is a Jinja file with no such file beside it.

    Raises:
        ConfigError: there is no template.
        DataError: the configuration is no JSON object.
    """
    if path.is_dir():
        found = [file for name in (FILE_NAME, CONFIG_NAME) if (file := path / name).is_file()]
        if not found:
            raise ConfigError(f"{path} has neither {FILE_NAME} nor {CONFIG_NAME}")
        path = found[0]
    if not path.is_file():
        raise ConfigError(f"there is no chat template at {path}")
    if path.suffix != ".json":
        beside = path.with_name(CONFIG_NAME)
        chosen = beside if beside.is_file() else config
        with user_errors(path):
            source = path.read_text(encoding="utf-8")
        return ChatTemplate(source, _special_tokens(_json(chosen)) if chosen and chosen.is_file() else {})
    content = _json(path)
    template = content.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise ConfigError(f"{path} has no chat_template", hint="give a Jinja file instead")
    return ChatTemplate(template, _special_tokens(content))


def strings(value: Any) -> Iterator[str]:
    """Every string inside a JSON value, keys excepted."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def _refuse_marks(messages: Messages, others: dict[str, Any]) -> None:
    if any(BEGIN in text or END in text for text in strings([messages, others])):
        raise DataError("a message contains U+FDD0 or U+FDD1, which are no characters of text")


def _json(path: Path) -> dict[str, Any]:
    with user_errors(path):
        content = path.read_bytes()
    try:
        found = json.loads(content)
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is no JSON object")
    return found


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """``bos_token`` and the like, as text."""
    found = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _turn_length(turn: str, content: Any) -> int:
    """How much of a turn counts: all of it, without white space behind an end-of-turn token."""
    said = content.strip() if isinstance(content, str) else ""
    place = turn.rfind(said)
    tail = turn[place + len(said) :] if place >= 0 else turn
    return len(turn.rstrip()) if tail.strip() else len(turn)


def _without_marks(marked: str) -> Rendering:
    """Take the marks out; they come in pairs by the grammar of the template."""
    spans, pieces, place, begin = [], [], 0, 0
    for piece in marked.split(BEGIN):
        said, mark, rest = piece.partition(END)
        if mark and said:
            spans.append((begin, begin + len(said)))
        pieces += [said, rest]
        place += len(said) + len(rest)
        begin = place
    return Rendering("".join(pieces), spans)


def _environment() -> tuple[Any, type[Exception]]:
    """A sandbox with what templates of models expect, and the class of the errors it raises."""
    jinja2 = optional("jinja2", "chat", "a chat template")
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[Any]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            self.environment.generation_blocks += 1  # type: ignore[attr-defined]
            begin, end = (nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (BEGIN, END))
            return [begin, *body, end]

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.generation_blocks = 0  # type: ignore[attr-defined]

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    added: dict[str, Any] = {"raise_exception": raise_exception}
    environment.globals.update(added)
    environment.filters["tojson"] = to_json
    return environment, jinja2.TemplateError
