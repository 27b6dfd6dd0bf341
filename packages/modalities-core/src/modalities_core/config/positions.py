"""Where a value stands in the user's files, and what is wrong there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from modalities_core.errors import ConfigError, ModalitiesError

NodePath = tuple[str | int, ...]


def dotted(path: NodePath) -> str:
    """``("trainer", "sinks", 0)`` as ``trainer.sinks.0``."""
    return ".".join(str(part) for part in path)


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a file, counted from one; line 0 stands for the command line."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a document."""

    path: NodePath
    message: str
    position: Position | None

    def __str__(self) -> str:
        where = dotted(self.path) or "document"
        return f"{where}: {self.message}" + (f" ({self.position})" if self.position else "")


class DocumentError(ConfigError):
    """Everything that is wrong with a document, one line each."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


def located(error: ModalitiesError, path: NodePath, position: Position | None) -> ModalitiesError:
    """``error``, saying at which config path and line it arose; one that already knows keeps its place."""
    if not error.where:
        error.where = dotted(path) + (f" ({position})" if position else "")
    return error


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
