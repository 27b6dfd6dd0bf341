"""``modalities chat``: talk with a model that was trained on conversations."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modalities_cli.sampling import chosen_sampling, sampling_options

if TYPE_CHECKING:
    from modalities_cli.source import Source
    from modalities_data.prepare.chat_encoder import ChatEncoder
    from modalities_models.generation import Sampling

HELP = "/reset forgets the conversation, /exit ends it (or Ctrl-D), Ctrl-C stops an answer."


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--system", help="What the model is told before the conversation begins.")
@click.option(
    "--chat-template", type=click.Path(path_type=Path),
    help="A Jinja file, or a tokenizer_config.json.  [default: what lies beside the model or its tokenizer]",
)  # fmt: skip
@click.option("--max-new-tokens", type=click.IntRange(1), default=512, show_default=True, help="Of one answer.")
@sampling_options
def chat(source: Path, system: str | None, chat_template: Path | None, **options: Any) -> None:
    """Talk with the model in SOURCE: a run's folder, a checkpoint of one, or a Hugging Face folder.

    Each line is a turn. /reset forgets the conversation, /exit or the end of input ends it; Ctrl-C stops an answer.
    Where a conversation outgrows the model's context, its oldest turns are left out. Without a terminal the lines of
    standard input are the turns, and the answers alone are printed.

    \b
    Example:
        modalities chat runs/chat --system "You answer in one sentence." --temperature 0.6
    """
    from modalities_cli.source import open_source

    sampling, precision, device = chosen_sampling(options), options.pop("precision"), options.pop("device")
    opened = open_source(source, device, precision)
    conversation = Conversation(opened, _encoder(opened, source, chat_template), system, sampling, **options)
    if sys.stdin.isatty():
        _talk(conversation)
    else:
        for line in sys.stdin:
            if not _turn(conversation, line):
                break


class Conversation:
    """What was said so far, and how the next answer is written.

    ``cut`` tells whether the last answer ended because it was long enough.

    Args:
        source: model and tokenizer.
        encoder: writes conversations as ids.
        system: what the model is told first; None for nothing.
        sampling: how tokens are chosen.
        max_new_tokens: the most of one answer.
        stop: texts at which an answer ends.
        seed: of the first answer; each further one has one more.
    """

    def __init__(
        self,
        source: Source,
        encoder: ChatEncoder,
        system: str | None,
        sampling: Sampling,
        max_new_tokens: int,
        stop: tuple[str, ...],
        seed: int,
    ) -> None:
        self._source, self._encoder, self._sampling, self._seed = source, encoder, sampling, seed
        self._max_new_tokens = max_new_tokens
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._ends, self._stop = source.stopping(stop)
        turn_end = encoder.turn_end()
        if turn_end.token is not None:
            self._ends.add(turn_end.token)
        elif turn_end.text:
            self._stop.append(turn_end.text)
        self._answers = 0
        self.cut = False
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.turns: list[dict[str, str]] = []

    def answer(self, text: str) -> Generator[str, None, None]:
        """The model's answer to ``text``, in pieces; what there is of it is remembered, also if it is not read out.

        Raises:
            DataError: the message holds a control token, is too long, or the template refuses it.
        """
        from modalities_models.generation import generate_text

        turns, ids = self._fitting([*self.turns, {"role": "user", "content": text}])
        room = self._source.model.sequence_length - len(ids)
        seeds = [self._seed + self._answers]
        self._answers += 1
        written: list[str] = []
        try:
            for piece in generate_text(
                self._source.model, self._source.tokenizer, [ids], min(self._max_new_tokens, room), self._sampling,
                seeds, self._ends, self._stop,
            ):  # fmt: skip
                self.cut = piece.finish == "length"
                # Many templates leave the blank between the prompt and the answer to the model.
                shown = piece.text if written else piece.text.lstrip()
                if shown:
                    written.append(shown)
                    yield shown
        finally:
            said = self._encoder.without_specials("".join(written)).strip()
            self.turns = [*turns, {"role": "assistant", "content": said}]

    def _fitting(self, turns: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
        """The latest turns that leave room for an answer, beginning with the user's, and the prompt's ids."""
        from modalities_core.errors import DataError

        longest = self._source.model.sequence_length
        room = longest - min(self._max_new_tokens, longest // 2)
        while True:
            ids = self._encoder.prompt([*self._opening, *turns])
            # A conversation is a document like any other.
            ids = ids if self._source.before == ids[:1] else [*self._source.before, *ids]
            if len(ids) <= room:
                return turns, ids
            if len(turns) == 1:
                raise DataError(
                    f"the message has {len(ids)} tokens with what the template adds; the model reads {longest}, and "
                    f"{longest - room} of them are kept for the answer",
                    hint="shorten it, or give a smaller --max-new-tokens",
                )
            turns = turns[2:]


def _encoder(source: Source, path: Path, chat_template: Path | None) -> ChatEncoder:
    """Writes conversations as the model was trained on them.

    Raises:
        ConfigError: there is no template, or the tokenizer is no tokenizer.json.
    """
    from modalities_core.errors import ConfigError
    from modalities_data.prepare.chat_encoder import ChatEncoder
    from modalities_data.prepare.chat_template import CONFIG_NAME, FILE_NAME, read_template
    from modalities_data.tokenizers.huggingface import HuggingFaceTokenizer

    if not isinstance(source.tokenizer, HuggingFaceTokenizer):
        raise ConfigError(
            f"chat needs a tokenizer.json; {path} has a {type(source.tokenizer).__name__}",
            hint="`modalities generate` continues plain text with any tokenizer",
        )
    configs = [place / CONFIG_NAME for place in source.templates if (place / CONFIG_NAME).is_file()]
    if chat_template is not None:
        return ChatEncoder(source.tokenizer, read_template(chat_template, next(iter(configs), None)))
    for place in source.templates:
        if _has_template(place):
            return ChatEncoder(source.tokenizer, read_template(place))
    raise ConfigError(
        f"{path} comes without a chat template: neither {FILE_NAME} nor a chat_template in {CONFIG_NAME} lies in "
        f"{' or '.join(map(str, source.templates))}",
        hint="give one with --chat-template FILE; a model that saw no conversations goes with `modalities generate`",
    )


def _has_template(folder: Path) -> bool:
    from modalities_core.errors import DataError
    from modalities_data.prepare.chat_template import CONFIG_NAME, FILE_NAME

    config = folder / CONFIG_NAME
    try:
        return (folder / FILE_NAME).is_file() or (
            config.is_file() and "chat_template" in json.loads(config.read_text(encoding="utf-8"))
        )
    except (OSError, ValueError) as error:
        raise DataError(f"{config} cannot be read: {error}") from error


def _talk(conversation: Conversation) -> None:
    """A conversation at a terminal."""
    from modalities_core.errors import DataError

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() a history and its keys
    click.echo(HELP)
    while True:
        try:
            if not _turn(conversation, input("> ")):
                return
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo(f"\n{HELP}")
        except DataError as error:
            click.echo(error, err=True)


def _turn(conversation: Conversation, line: str) -> bool:
    """Answer a line, or do what it asks for; whether the conversation goes on."""
    line = line.strip()
    if line == "/exit":
        return False
    if line == "/reset":
        conversation.reset()
    elif line.startswith("/") and line[1:].isalpha():
        click.echo(f"there is no {line}; {HELP}", err=True)
    elif line:
        # Closed also where Ctrl-C comes between two pieces, so that what was said is remembered.
        with contextlib.closing(conversation.answer(line)) as pieces:
            for piece in pieces:
                click.echo(piece, nl=False)
        click.echo()
        if conversation.cut:
            click.echo("(cut: --max-new-tokens or the model's context allow no more)", err=True)
    return True
