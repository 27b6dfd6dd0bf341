"""Made-up text that a model can learn from: a pure function of (seed, document number).

A fixed vocabulary of invented words has Zipf frequencies (Zipf, 1949), and every word has a few favourite successors,
so that the next word is partly predictable (a first-order Markov chain). Only raw Philox bits are used (Salmon et al.,
2011), whose stream NumPy guarantees, so the text is the same under every version.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from functools import cache

import numpy as np

LOREM_VERSION = 1
"""Counts up whenever the same seed gives other text."""

WORDS = 600
SUCCESSORS = 6
FOLLOW = 0.7
"""How often the next word is one of the favourite successors."""

_ONSETS = ("", "b", "c", "d", "f", "g", "l", "m", "n", "p", "qu", "r", "s", "t", "v", "tr", "st", "pl")
_VOWELS = ("a", "e", "i", "o", "u", "ae", "ia")
_CODAS = ("", "", "", "m", "n", "r", "s", "t", "x")


def lorem_document(seed: int, number: int) -> str:
    """The document ``number`` of the collection ``seed``: one to four paragraphs, about half a kilobyte.

    Args:
        seed: chooses the collection, 0 to 2**63 - 1; the language is the same in all.
        number: of the document, from 0 on.
    """
    words, frequencies, successors = _language()
    uniform = iter(_uniforms(seed, number, 1024))
    paragraphs = []
    for _ in range(1 + int(next(uniform) * 4)):
        sentences = [_sentence(uniform, words, frequencies, successors) for _ in range(2 + int(next(uniform) * 5))]
        paragraphs.append(" ".join(sentences))
    return "\n\n".join(paragraphs) + "\n"


def _sentence(uniform: Iterator[float], words: list[str], frequencies: list[float], successors: list[list[int]]) -> str:
    """Four to fifteen words, the first one capital, some followed by a comma."""
    word = bisect_left(frequencies, next(uniform))
    chosen = []
    length = 4 + int(next(uniform) * 12)
    for place in range(length):
        comma = "," if 1 < place < length - 2 and next(uniform) < 0.08 else ""
        chosen.append(words[word] + comma)
        draw = next(uniform)
        if draw < FOLLOW:
            # The square makes the first successors the likeliest.
            word = successors[word][int((draw / FOLLOW) ** 2 * SUCCESSORS)]
        else:
            word = bisect_left(frequencies, (draw - FOLLOW) / (1 - FOLLOW))
    return " ".join(chosen).capitalize() + "."


@cache
def _language() -> tuple[list[str], list[float], list[list[int]]]:
    """Words, their cumulative frequencies (WORDS,) and favourite successors (WORDS, SUCCESSORS)."""
    uniform = iter(_uniforms(0, 2**64 - 1, 1 << 15))

    def pick(choices: tuple[str, ...]) -> str:
        return choices[int(next(uniform) * len(choices))]

    words: dict[str, None] = {}
    while len(words) < WORDS:
        # Frequent words are short, as in any language.
        syllables = 1 + int(next(uniform) * (1 + min(3, len(words) / 40)))
        words["".join(pick(_ONSETS) + pick(_VOWELS) for _ in range(syllables)) + pick(_CODAS)] = None
    weights = 1 / (np.arange(WORDS) + 2.7)
    frequencies = np.cumsum(weights / weights.sum())
    frequencies[-1] = 1.0
    draws = np.array([next(uniform) for _ in range(WORDS * SUCCESSORS)])
    successors = np.searchsorted(frequencies, draws).reshape(WORDS, SUCCESSORS)
    return list(words), frequencies.tolist(), successors.tolist()


def _uniforms(seed: int, stream: int, count: int) -> list[float]:
    """``count`` numbers in [0, 1) with 53 bits from the Philox stream (seed, stream)."""
    bits = np.random.Philox(key=np.array([seed, stream], np.uint64)).random_raw(count)
    return ((bits >> np.uint64(11)) * 2.0**-53).tolist()
