"""Where a value stands in the user's files, and what is wrong there."""

from __future__ import annotations

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
