"""Text from tokens as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Model, Tokenizer
from modalities_models.generation.decoding import FinishReason, generate_batch
from modalities_models.generation.sampling import Sampling

CONTEXT = 6
"""Tokens of the prompt that the first new ones are decoded with: some tokenizers write a blank only between tokens."""


class Piece(NamedTuple):
    """The next piece of one prompt's continuation.

    prompt: its index.
    text: whole characters; may be empty.
    tokens: ids found since the last piece.
    finish: why the text ends here; None while it goes on.
    """

    prompt: int
    text: str
    tokens: tuple[int, ...]
    finish: FinishReason | None


@dataclass(frozen=True, slots=True)
class Continuation:
    """What was generated after one prompt.

    text: without a stop string and what came after it.
    tokens: all that the model gave, without an end token.
    finish: ``end`` (an end token), ``stop`` (a stop string) or ``length`` (as many tokens as were asked for).
    """

    text: str
    tokens: tuple[int, ...]
    finish: FinishReason


def generate_text(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    end_tokens: Collection[int] | None = None,
    stop: Sequence[str] = (),
    cache: bool = True,
) -> Iterator[Piece]:
    """The text that follows each of ``prompts``, in pieces as soon as they are certain.

    Args:
        model: see :func:`modalities_models.generation.generate_batch`, as for all that is not named here.
        tokenizer: the one the model was trained with.
        prompts: ids, at least one each.
        max_new_tokens: the most tokens for each.
        sampling: how tokens are chosen.
        seeds: one per prompt.
        end_tokens: ids that end a text; by default the tokenizer's end of document.
        stop: strings that end a text where they occur behind the prompt, whatever tokens they are made of.
        cache: keep keys and values between tokens.

    Raises:
        ConfigError: as for ``generate_batch``, or a stop string is empty.
        NumericalError: the model gave logits that are not numbers.
    """
    if not all(stop):
        raise ConfigError("a stop string is empty", hint="leave it out to go on until an end token")
    ends = (tokenizer.end_of_document,) if end_tokens is None else end_tokens
    streams = [TextStream(tokenizer.decode, stop, context(tokenizer, prompt)) for prompt in prompts]

    def stopped(prompt: int, token: int) -> bool:
        return streams[prompt].add(token)

    return _pieces(generate_batch(model, prompts, max_new_tokens, sampling, seeds, ends, stopped, cache), streams)


def context(tokenizer: Tokenizer, prompt: Sequence[int]) -> Sequence[int]:
    """The last tokens of a prompt, from the beginning of a character on."""
    for count in range(CONTEXT, 2 * CONTEXT):
        if not tokenizer.decode(prompt[-count:]).startswith("\ufffd"):
            return prompt[-count:]
    return ()


def _pieces(found: Iterator, streams: list[TextStream]) -> Iterator[Piece]:
    try:
        for new in found:
            stream = streams[new.prompt]
            tokens = () if new.token is None else (new.token,)
            yield Piece(new.prompt, stream.take(last=new.finish is not None), tokens, new.finish)
    finally:
        found.close()  # type: ignore[attr-defined]


def joined(pieces: Iterator[Piece], prompts: int) -> list[Continuation]:
    """Whole continuations, in the order of the prompts.

    Args:
        pieces: from :func:`generate_text`.
        prompts: how many there are.
    """
    texts: list[list[str]] = [[] for _ in range(prompts)]
    tokens: list[list[int]] = [[] for _ in range(prompts)]
    finish: list[FinishReason] = ["length"] * prompts
    for piece in pieces:
        texts[piece.prompt].append(piece.text)
        tokens[piece.prompt].extend(piece.tokens)
        finish[piece.prompt] = piece.finish or finish[piece.prompt]
    return [Continuation("".join(text), tuple(ids), why) for text, ids, why in zip(texts, tokens, finish, strict=True)]


class TextStream:
    """Decodes one token after another and finds stop strings.

    Only the last tokens are decoded again with each new one. A piece ends with a whole character: while the decoded
    text ends in a replacement character, the next token may still complete it.

    Args:
        decode: ids to text.
        stop: strings that end the text.
        context: ids that come before the first; they are not part of the text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str], context: Sequence[int]) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._tokens = list(context)
        self._known = decode(self._tokens) if self._tokens else ""
        # The tokens whose text is known already.
        self._read = len(self._tokens)
        self._held = ""
        self._stopped = False

    def add(self, token: int) -> bool:
        """Take the next token; whether the text has come to a stop string."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        if not text.endswith("\ufffd"):
            self._advance(text)
        return self._stopped

    def take(self, last: bool = False) -> str:
        """What is certain and was not taken yet; with ``last`` all there is."""
        if last and not self._stopped:
            self._advance(self._decode(self._tokens))
        keep = 0 if last or self._stopped else self._beginning()
        piece = self._held[: len(self._held) - keep]
        self._held = self._held[len(piece) :]
        return piece

    def _advance(self, text: str) -> None:
        """All of ``text``, the decoded tokens, is certain."""
        self._held += text[len(self._known) :]
        # What was new becomes the context of what comes next, unless it has no text.
        known = self._decode(self._tokens[self._read :])
        self._known = known or text
        self._tokens = self._tokens[self._read if known else 0 :]
        self._read = len(self._tokens)
        places = [place for word in self._stop if (place := self._held.find(word)) >= 0]
        if places:
            self._held, self._stopped = self._held[: min(places)], True

    def _beginning(self) -> int:
        """How many characters at the end could be the beginning of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for count in range(min(longest, len(self._held)), 0, -1):
            if any(word.startswith(self._held[-count:]) for word in self._stop):
                return count
        return 0
