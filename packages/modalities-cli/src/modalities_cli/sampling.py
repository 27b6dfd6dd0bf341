"""The options of commands that write text: how tokens are chosen, where and in which precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from modalities_models.generation import Sampling

OPTIONS = (
    click.option(
        "--temperature", type=click.FloatRange(0), default=0.8, show_default=True, help="0 takes the likeliest."
    ),
    click.option("--top-k", type=click.IntRange(1), help="Sample from the K likeliest tokens only."),
    click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample from the likeliest mass P only."),
    click.option("--min-p", type=click.FloatRange(0, 1), help="Sample from tokens P times as likely as the likeliest."),
    click.option(
        "--repetition-penalty", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True,
        help="Above 1 discourages tokens that occurred.",
    ),
    click.option("--stop", multiple=True, metavar="TEXT", help="End where TEXT would come; may be given repeatedly."),
    click.option("--seed", type=int, default=0, show_default=True, help="The same seed writes the same text."),
    click.option(
        "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
        help="auto is a GPU if there is one.",
    ),
    click.option(
        "--precision", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
        show_default=True, help="Of the weights; auto is as they are stored.",
    ),
)  # fmt: skip


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options above."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def chosen_sampling(options: dict[str, Any]) -> Sampling:
    """What the options say about choosing tokens; they are taken out of ``options``."""
    from modalities_models.generation import Sampling

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return Sampling(**{name: options.pop(name) for name in names})
