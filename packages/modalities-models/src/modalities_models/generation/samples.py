"""The component ``generation.text``: a model and its tokenizer as a function from prompts to texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Model, TextGenerator, Tokenizer
from modalities_models.generation.decoding import generate_batch
from modalities_models.generation.sampling import Sampling
from modalities_models.generation.text import TextStream, context


def text(
    model: Model,
    tokenizer: Tokenizer,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
) -> TextGenerator:
    """A function that continues prompts with a model that may still be training, also one sharded over the ranks.

    Each prompt begins a document of its own; its text ends with the document or with ``max_new_tokens``. All ranks of
    a sharded model have to call it with the same prompts. The same seed gives the same text from the same weights.

    Args:
        model: the model of the run.
        tokenizer: the one it is trained with.
        max_new_tokens: the most tokens of a text, at least 1.
        temperature: of the sampling; 0 takes the likeliest token.
        top_k: sample from the k likeliest tokens only.
        top_p: sample from the smallest set of likeliest tokens that has at least this probability.
        min_p: sample from tokens at least this fraction as likely as the likeliest one.
        repetition_penalty: above 1 discourages tokens that occurred.
        seed: of the first prompt; each later one has a seed one higher.

    Raises:
        ConfigError: an argument is out of range.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens has to be at least 1, not {max_new_tokens}", about=(text, "max_new_tokens"))
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )

    def generate(prompts: Sequence[str]) -> list[str]:
        ids = [[tokenizer.end_of_document, *tokenizer.encode(prompt)] for prompt in prompts]
        found: list[list[int]] = [[] for _ in ids]
        seeds = range(seed, seed + len(ids))
        # Blocks compiled for training would be compiled again for every shape of generation.
        with torch.compiler.set_stance("force_eager"):
            # Without end tokens: ranks that share a model go through it equally often, whatever each of them finds.
            for new in generate_batch(model, ids, max_new_tokens, sampling, seeds):
                assert new.token is not None
                found[new.prompt].append(new.token)
        return [_written(tokenizer, prompt, tokens) for prompt, tokens in zip(ids, found, strict=True)]

    return generate


def _written(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    """The text of ``tokens`` up to the end of the document."""
    stream = TextStream(tokenizer.decode, (), context(tokenizer, prompt))
    for token in tokens:
        if token == tokenizer.end_of_document:
            break
        stream.add(token)
    return stream.take(last=True)
