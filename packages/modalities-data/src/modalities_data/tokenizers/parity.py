"""Whether two engines give equal ids: odd strings that have told tokenizers apart, and the user's own documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import xxhash

from modalities_data.tokenizers.engines import Engine

COMPARED_CHARACTERS = 1 << 16
"""How much of the first documents is compared: a few hundredths of a second of the slower engine."""

_ODD = (
    "", " ", "  ", "\n", "\r\n", "\t", "\x00", "\ufeff", "\u00a0", "\u2028", "\u3000", "\u200b\u200d",
    "I'm you're he's we'll they've I'd don't 'S 'T 'LL \u017fs '\u017f",
    "a  b   c    d\n\n\ne\r\n\r\nf\t\tg \n h", "  leading", "trailing   ", "\n\n  mixed \t\n ",
    "1 12 123 1234 12345 3.14 1,000,000 1e-05 0xFF \u0661\u0662\u0663 \u00bd\u00b2",
    "caf\u00e9 cafe\u0301 \u00c5 A\u030a \u212b \ufb01 \u1e9b\u0323 \u0130 \u0131",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd \u2764\ufe0f",
    "\u4e2d\u6587\u6d4b\u8bd5 \u65e5\u672c\u8a9e\u3067\u3059 \ud55c\uad6d\uc5b4 \u0e44\u0e17\u0e22",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea",
    "def f(x):\n    return x**2  # square\n\n\nclass A:\n\tpass\n", "https://example.org/a?b=c&d=%20#e f@g.hi",
    "<a href=\"b\">c</a> &amp; {\"d\": [1, null]}", "!!! ??? ... --- ___ === >>> \u2014 \u201cq\u201d",
    "UPPER lower Title camelCase snake_case kebab-case", "\u00df \u1e9e \u03c3\u03c2 \u01c5",
)  # fmt: skip


def odd_strings(special_tokens: Sequence[str]) -> Iterator[str]:
    """Some hundred short strings: blocks of Unicode, long runs, white space, and ``special_tokens`` inside text."""
    yield from _ODD
    for first in [*range(0, 0x3000, 0x80), *range(0xA000, 0xD000, 0x800), *range(0x1F300, 0x1FA00, 0x80)]:
        characters = [chr(code) for code in range(first, first + 0x80)]
        yield "".join(characters)
        yield " ".join(characters[::3]) + "a".join(characters[1::5])
    for character in "a \n0=-\u00e9\u4e2d\U0001f600":
        yield from (character * 17, character * 1023, f"x{character * 64}y")
    for token in special_tokens[:8]:
        yield from (token, f"a {token} b", f"a{token}{token}b", token[:-1], f" {token}\n")


def first_difference(engine: Engine, reference: Engine, documents: Sequence[str]) -> str:
    """The first document on which the ids differ, shortened, as one sentence; empty where none does."""
    ids, offsets = engine.encode_flat(documents)
    expected, expected_offsets = reference.encode_flat(documents)
    if np.array_equal(offsets, expected_offsets) and np.array_equal(ids, expected):
        return ""
    for number, document in enumerate(documents):
        found = ids[offsets[number] : offsets[number + 1]].tolist()
        right = expected[expected_offsets[number] : expected_offsets[number + 1]].tolist()
        if found != right:
            pairs = enumerate(zip(found, right, strict=False))
            place = next((i for i, (a, b) in pairs if a != b), min(len(found), len(right)))
            return (
                f"{document[:40]!r} gives {found[place : place + 4]} at token {place}, not {right[place : place + 4]}"
            )
    return f"{len(offsets) - 1} documents came back, not {len(documents)}"


def leading_documents(documents: Sequence[str]) -> list[str]:
    """The first documents up to COMPARED_CHARACTERS, the last of them cut there."""
    room = COMPARED_CHARACTERS
    chosen = []
    for document in documents:
        if room <= 0:
            break
        chosen.append(document[:room])
        room -= len(document)
    return chosen


def digest(before: str, engine: Engine, reference: Engine, documents: Sequence[str]) -> str:
    """xxh3-64 of what was compared and of the ids, which were equal, chained to the digest of what was compared before.

    Equal digests mean: the same versions gave the same ids for the same texts.
    """
    chained = xxhash.xxh3_64(f"{before} {engine.name} {engine.version} {reference.name} {reference.version}".encode())
    for document in documents:
        content = document.encode(errors="surrogatepass")
        chained.update(f" {len(content)} ".encode() + content)
    ids, offsets = reference.encode_flat(documents)
    for values in (offsets.astype("<i8"), ids.astype("<u4")):
        chained.update(values.data)
    return chained.hexdigest()
