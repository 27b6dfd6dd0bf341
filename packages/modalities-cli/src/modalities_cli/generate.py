"""``modalities generate``: text from a trained run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("run_folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--prompt", default="", help="The text to continue; - reads standard input.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.8, show_default=True, help="0 takes the likeliest.")
@click.option("--top-k", type=click.IntRange(1), help="Sample from the K likeliest tokens only.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample from the likeliest mass P only.")
@click.option("--seed", type=int, default=0, show_default=True)
def generate(
    run_folder: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> None:
    """Continue a text with the newest checkpoint of the run in RUN_FOLDER.

    \b
    Example:
        modalities generate runs/quickstart --prompt "def " --temperature 0.7
    """
    from modalities_cli.wiring import open_run, trained_model
    from modalities_core.errors import ConfigError

    graph = open_run(run_folder)
    tokenizer = graph.build("tokenizer")
    if tokenizer is None:
        raise ConfigError(f"the document of {run_folder} names no `tokenizer`", hint="add one at the top level")
    model, _ = trained_model(graph, run_folder)
    text = sys.stdin.read() if prompt == "-" else prompt
    click.echo(text, nl=False)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    for piece in continuation(model, tokenizer, text, max_new_tokens, **sampling):
        click.echo(piece, nl=False)
    click.echo()


def continuation(model: Any, tokenizer: Any, text: str, max_new_tokens: int, **sampling: Any) -> Iterator[str]:
    """The text that follows ``text``, in pieces of whole characters as soon as they are known.

    Args:
        model: a trained Model.
        tokenizer: the one it was trained with.
        text: the prompt; where it is empty, the model starts a document.
        max_new_tokens: the most tokens to add.
        sampling: temperature, top_k, top_p and seed of :func:`modalities_models.generation.generate`.
    """
    from modalities_models.generation import generate as generate_tokens

    # Every document follows an end-of-document token in training, so that is where a prompt belongs.
    prompt = [tokenizer.end_of_document, *tokenizer.encode(text)]
    tokens: list[int] = []
    shown = ""
    for token in generate_tokens(model, prompt, max_new_tokens, end_of_document=tokenizer.end_of_document, **sampling):
        tokens.append(token)
        known = tokenizer.decode(tokens)
        # A replacement character at the end may be the first half of a character that comes with the next token.
        if known.endswith("\ufffd") and len(known) - len(shown) < 4:
            continue
        yield known[len(shown) :]
        shown = known
    if tokens and tokenizer.decode(tokens) != shown:
        yield tokenizer.decode(tokens)[len(shown) :]
