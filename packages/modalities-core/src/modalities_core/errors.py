"""Errors a user can cause, each with the exit code of the process it ends.

Raise the class that fits, with one sentence that says what is wrong and, in ``hint``, how to mend it. The command
line prints it without a traceback. Anything else that escapes is a bug of ours: exit code 1, with its traceback.
"""

from __future__ import annotations

from typing import ClassVar

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_CHECKPOINT = 4
EXIT_RESOURCE = 5
EXIT_DISTRIBUTED = 6
EXIT_NUMERICAL = 7
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130


class ModalitiesError(Exception):
    """A user-visible failure.

    Args:
        message: what is wrong, one sentence.
        hint: how to mend it.
        about: the built object the message is about, or ``(object, "argument")``; the config graph turns it into a
            config path and a file position.
    """

    exit_code: ClassVar[int] = EXIT_BUG

    def __init__(self, message: str, *, hint: str = "", about: object | tuple[object, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.about = about
        self.where = ""

    def __str__(self) -> str:
        """``where: message`` and the hint on a line of its own."""
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\n  {self.hint}" if self.hint else text


class ConfigError(ModalitiesError):
    """Wrong usage or a wrong configuration."""

    exit_code = EXIT_CONFIG


class DataError(ModalitiesError):
    """Input data that is missing, damaged or not what it claims to be."""

    exit_code = EXIT_DATA


class CheckpointError(ModalitiesError):
    """A checkpoint that is invalid or does not fit the run."""

    exit_code = EXIT_CHECKPOINT


class ResourceError(ModalitiesError):
    """Out of disk or memory."""

    exit_code = EXIT_RESOURCE


class DistributedError(ModalitiesError):
    """A rank failed, hung or could not be reached."""

    exit_code = EXIT_DISTRIBUTED


class NumericalError(ModalitiesError):
    """A loss or gradient that is not finite; the weights were not changed by it."""

    exit_code = EXIT_NUMERICAL


class Preempted(ModalitiesError):
    """The run was asked to stop, has saved, and wants to be queued again."""

    exit_code = EXIT_PREEMPTED


class Interrupted(ModalitiesError):
    """The user interrupted the run; it has saved."""

    exit_code = EXIT_INTERRUPTED


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
