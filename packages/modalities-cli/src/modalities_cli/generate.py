"""``modalities generate``: text from a trained run."""

from __future__ import annotations

import sys
from pathlib import Path

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
    click.echo(continue_text(model, tokenizer, text, max_new_tokens, temperature, top_k, top_p, seed))
