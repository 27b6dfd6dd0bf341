"""Tokens one after another, for one prompt or for many in one batch.

What the model sees of a text are its last ``model.sequence_length`` tokens; from the point where the beginning falls
out of that window, every token costs a pass over the whole window.

A row's sample is decided by its own seed alone: the numbers it draws do not depend on the other rows, the batch or
the device. Only rounding can, because a matrix product over more rows may round differently.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import nn

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Model
from modalities_models.generation.reading import Reader
from modalities_models.generation.sampling import Sampler, Sampling

FinishReason = Literal["end", "stop", "length"]
"""An end token, whatever ``stop`` looked for, or the most tokens that were asked for."""


class NewToken(NamedTuple):
    """What was found out about one prompt's continuation.

    prompt: its index.
    token: the next token; None if the text ended before it, with an end token or because none was asked for.
    finish: why the text ends here; None while it goes on.
    """

    prompt: int
    token: int | None
    finish: FinishReason | None


def generate(
    model: Model,
    tokens: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    end_of_document: int | None = None,
    cache: bool = True,
) -> Iterator[int]:
    """The tokens that follow one prompt, each as soon as it is known.

    Args:
        model: as for :func:`generate_batch`, and so is what happens to it.
        tokens: the prompt's ids, at least one.
        max_new_tokens: the most tokens to give.
        temperature: see :class:`Sampling`, as for the three below.
        top_k: sample from the k most likely tokens only.
        top_p: sample from the smallest set of most likely tokens that has at least this probability.
        min_p: sample from tokens at least this fraction as likely as the most likely one.
        repetition_penalty: above 1 discourages tokens that occurred.
        seed: of the sampling.
        end_of_document: the id that ends the text; it is not given itself.
        cache: keep keys and values between tokens where the model can; False recomputes them.

    Raises:
        ConfigError: an argument is out of range, or a prompt id is not in the vocabulary.
        NumericalError: the model gave logits that are not numbers.
    """
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    ends = () if end_of_document is None else (end_of_document,)
    found = generate_batch(model, [tokens], max_new_tokens, sampling, [seed], ends, cache=cache)
    return _tokens(found)


def _tokens(found: Iterator[NewToken]) -> Iterator[int]:
    # Closed here, so that closing this iterator gives the model back at once.
    try:
        for new in found:
            if new.token is not None:
                yield new.token
    finally:
        found.close()  # type: ignore[attr-defined]


def generate_batch(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    end_tokens: Collection[int] = (),
    stop: Callable[[int, int], bool] | None = None,
    cache: bool = True,
) -> Iterator[NewToken]:
    """The tokens that follow each of ``prompts``, one step of all unfinished ones after another.

    The model is in evaluation mode until the iterator is used up or closed, then as it was.

    Args:
        model: any Model. One that has ``new_caches(capacity)`` takes its result as a second argument and reads each
            token only once while the window is not full; it also takes ``padding_B`` by keyword, (B,) int64, how
            many tokens at the left of each row are no text. Caches with ``keep(rows)`` drop texts that have ended.
        prompts: ids, at least one each; of any lengths.
        max_new_tokens: the most tokens to give for each.
        sampling: how tokens are chosen; by default from the model's own distribution.
        seeds: one per prompt; by default the prompts' indices.
        end_tokens: ids that end a text; they are not given themselves.
        stop: called with a prompt's index and each of its tokens; a true result makes that token its last.
        cache: keep keys and values between tokens where the model can; False recomputes them.

    Yields:
        One ``NewToken`` per unfinished prompt and step; the last of each prompt has ``finish``.

    Raises:
        ConfigError: an argument is out of range, or a prompt id is not in the vocabulary.
        NumericalError: the model gave logits that are not numbers.
    """
    seeds = range(len(prompts)) if seeds is None else seeds
    _check(model, prompts, max_new_tokens, seeds)
    texts = [list(tokens) for tokens in prompts]
    return _generate(model, texts, max_new_tokens, sampling or Sampling(), seeds, frozenset(end_tokens), stop, cache)


def _generate(
    model: Model,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int],
    end_tokens: frozenset[int],
    stop: Callable[[int, int], bool] | None,
    cache: bool,
) -> Iterator[NewToken]:
    assert isinstance(model, nn.Module), "a Model is a torch module"
    if not max_new_tokens or not prompts:
        yield from (NewToken(prompt, None, "length") for prompt in range(len(prompts)))
        return
    texts = dict(enumerate(prompts))
    reader = Reader(model, max_new_tokens, cache)
    sampler = Sampler(sampling, prompts, seeds, max_new_tokens)
    training = model.training
    model.eval()
    try:
        for left in reversed(range(max_new_tokens)):
            for prompt, token in _next_tokens(reader, sampler, texts):
                finish: FinishReason | None = None if left else "length"
                if token in end_tokens:
                    finish = "end"
                elif stop is not None and stop(prompt, token):
                    finish = "stop"
                if finish:
                    del texts[prompt]
                else:
                    texts[prompt].append(token)
                yield NewToken(prompt, None if finish == "end" else token, finish)
            if not texts:
                return
    finally:
        model.train(training)


@torch.inference_mode()
def _next_tokens(reader: Reader, sampler: Sampler, texts: dict[int, list[int]]) -> list[tuple[int, int]]:
    """The token that follows each text, with its prompt."""
    order, logits_BV = reader.read(texts)
    return list(zip(order, sampler.choose(order, logits_BV), strict=True))


def _check(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, seeds: Sequence[int]) -> None:
    for index, tokens in enumerate(prompts):
        which = "the prompt" if len(prompts) == 1 else f"prompt {index + 1}"
        if not tokens:
            raise ConfigError(f"{which} has no token", hint="start from the end-of-document token for unprompted text")
        if outside := [token for token in tokens if not 0 <= token < model.vocab_size]:
            raise ConfigError(
                f"{which} has token {outside[0]}, but the model's vocabulary is 0 to {model.vocab_size - 1}",
                hint="use the tokenizer the model was trained with",
            )
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens cannot be negative: {max_new_tokens}")
    if len(seeds) != len(prompts):
        raise ConfigError(f"there are {len(prompts)} prompts and {len(seeds)} seeds", hint="give one seed per prompt")
