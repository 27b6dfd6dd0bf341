"""Suggestions for names that do not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """``; did you mean `x`?`` for the nearest candidate, or nothing."""
    near = nearest(name, candidates)
    return f"; did you mean `{near}`?" if near else ""


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like ``name``: one letter away, or similar as a whole; None if there is no such."""
    unique = list(dict.fromkeys(candidates))
    for candidate in unique:
        if _one_letter_apart(name, candidate):
            return candidate
    matches = difflib.get_close_matches(name, unique, n=1, cutoff=0.6)
    return matches[0] if matches else None


def _one_letter_apart(a: str, b: str) -> bool:
    """Whether one insertion, deletion, replacement or swap of neighbours turns ``a`` into ``b``."""
    if abs(len(a) - len(b)) > 1 or a == b:
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    rest_a, rest_b = a[start:], b[start:]
    swapped = rest_a[:2] == rest_b[1::-1] and rest_a[2:] == rest_b[2:]
    return rest_a[1:] == rest_b[1:] or rest_a[1:] == rest_b or rest_a == rest_b[1:] or swapped
