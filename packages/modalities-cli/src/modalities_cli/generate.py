"""``modalities generate``: text from a trained model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modalities_cli.sampling import chosen_sampling, sampling_options

if TYPE_CHECKING:
    from modalities_cli.source import Source
    from modalities_models.generation import Sampling

BETWEEN = "---"
"""A line between one text and the next."""


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", multiple=True, help="A text to continue; - reads all of standard input.")
@click.option(
    "--file", type=click.Path(path_type=Path, allow_dash=True),
    help='Prompts, one per line; in a .jsonl file {"prompt": "..."}; - reads lines from standard input.',
)  # fmt: skip
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@sampling_options
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Prompts at a time.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per prompt: prompt, text, tokens, finish.")
def generate(source: Path, prompts: tuple[str, ...], file: Path | None, **options: Any) -> None:
    """Continue texts with the model in SOURCE: a run's folder, a checkpoint of one, or a Hugging Face folder.

    A single text is shown while it is written. With several, each is sampled with a seed of its own: --seed for the
    first, one more for each after it, whatever the size of a batch. In JSON, finish is `end` (the model ended the
    text), `stop` (at a --stop text) or `length`.

    \b
    Example:
        modalities generate runs/quickstart --prompt "def " --temperature 0.7
        modalities generate runs/quickstart/checkpoints/step-00000300 --file prompts.jsonl --json > texts.jsonl
    """
    from modalities_cli.source import open_source
    from modalities_core.errors import ConfigError

    if prompts and file is not None:
        raise ConfigError("give prompts by --prompt or by --file, not by both")
    sampling, precision, device = chosen_sampling(options), options.pop("precision"), options.pop("device")
    opened = open_source(source, device, precision)
    texts = _lines(file) if file is not None else _given(prompts or ("",))
    if file is None and len(prompts) < 2 and not options["as_json"]:
        _stream(opened, next(texts), sampling, options)
    else:
        _write_all(opened, texts, sampling, **options)


def continuation(model: Any, tokenizer: Any, text: str, max_new_tokens: int, seed: int = 0, **sampling: Any) -> str:
    """The text that follows ``text`` in a document of its own.

    Args:
        model: a trained Model.
        tokenizer: the one it was trained with.
        text: the prompt; where it is empty, the model starts a document.
        max_new_tokens: the most tokens to add.
        seed: of the sampling.
        sampling: arguments of :class:`modalities_models.generation.Sampling`.
    """
    from modalities_models.generation import Sampling, generate_text

    prompt = [tokenizer.end_of_document, *tokenizer.encode(text)]
    pieces = generate_text(model, tokenizer, [prompt], max_new_tokens, Sampling(**sampling), [seed])
    return "".join(piece.text for piece in pieces)


def _given(prompts: tuple[str, ...]) -> Iterator[str]:
    for text in prompts:
        yield sys.stdin.read() if text == "-" else text


def _lines(file: Path) -> Iterator[str]:
    """The prompts of a file, one at a time.

    Raises:
        DataError: the file cannot be read, or a line is no JSON object with a prompt.
    """
    from modalities_core.errors import DataError

    try:
        stream = sys.stdin if str(file) == "-" else file.open(encoding="utf-8")
        with stream:
            for number, line in enumerate(stream, 1):
                yield _prompt(line, f"{file}:{number}") if file.suffix == ".jsonl" else line.removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{file} cannot be read: {reason}", hint="prompts are lines of UTF-8 text") from error


def _prompt(line: str, place: str) -> str:
    from modalities_core.errors import DataError

    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, LookupError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise DataError(f'{place} is no JSON object with a text under "prompt"')
    return prompt


def _stream(source: Source, prompt: str, sampling: Sampling, options: dict[str, Any]) -> None:
    """Show one text while it is written."""
    from modalities_models.generation import generate_text

    ids = source.prompt(prompt)
    _warn_if_long(source, ids, "the prompt")
    ends, stop = source.stopping(options["stop"])
    click.echo(prompt, nl=False)
    for piece in generate_text(
        source.model, source.tokenizer, [ids], options["max_new_tokens"], sampling, [options["seed"]], ends, stop
    ):
        click.echo(piece.text, nl=False)
    click.echo()


def _write_all(
    source: Source,
    prompts: Iterator[str],
    sampling: Sampling,
    max_new_tokens: int,
    stop: tuple[str, ...],
    seed: int,
    batch_size: int,
    as_json: bool,
) -> None:
    """Write many texts in the order of their prompts; only one batch is in memory."""
    from modalities_models.generation import generate_text
    from modalities_models.generation.text import joined

    ends, strings = source.stopping(stop)
    first = 0
    while batch := list(islice(prompts, batch_size)):
        ids = [source.prompt(prompt) for prompt in batch]
        for number, tokens in enumerate(ids, first + 1):
            _warn_if_long(source, tokens, f"prompt {number}")
        seeds = range(seed + first, seed + first + len(batch))
        pieces = generate_text(source.model, source.tokenizer, ids, max_new_tokens, sampling, seeds, ends, strings)
        for number, (prompt, found) in enumerate(zip(batch, joined(pieces, len(batch)), strict=True), first):
            if as_json:
                entry = {"prompt": prompt, "text": found.text, "tokens": found.tokens, "finish": found.finish}
                click.echo(json.dumps(entry, ensure_ascii=False))
            else:
                click.echo((BETWEEN + "\n" if number else "") + prompt + found.text)
        first += len(batch)


def _warn_if_long(source: Source, ids: list[int], which: str) -> None:
    longest = source.model.sequence_length
    if len(ids) > longest:
        click.echo(f"warning: {which} has {len(ids)} tokens; the model sees the last {longest} of them", err=True)
