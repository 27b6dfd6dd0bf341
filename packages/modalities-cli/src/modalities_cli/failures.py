"""From whatever went wrong to a message on standard error and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable

import click

from modalities_core.errors import (
    EXIT_BUG,
    EXIT_CONFIG,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    ConfigError,
    ModalitiesError,
    ResourceError,
)


def guarded(command: Callable[[], object]) -> int:
    """Run ``command`` and return the exit code of the process; ``MODALITIES_DEBUG=1`` shows every traceback."""
    try:
        result = command()
        return result if isinstance(result, int) else EXIT_DONE
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return EXIT_CONFIG
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted")
        return EXIT_INTERRUPTED
    except ModalitiesError as error:
        return _report(error)
    except BrokenPipeError:
        # The reader of our output has left (a pager, `head`); nothing is wrong. Python must not flush again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except Exception as error:
        if resource := _resource_error(error):
            return _report(resource)
        traceback.print_exc()
        _say("error: this is a bug in Modalities or a plugin; the traceback above shows where")
        return EXIT_BUG


def _report(error: ModalitiesError) -> int:
    rank = os.environ.get("RANK", "0")
    if isinstance(error, ConfigError) and rank != "0":
        # Every rank reads the same document: once is enough.
        return error.exit_code
    if os.environ.get("MODALITIES_DEBUG"):
        traceback.print_exc()
    prefix = f"error (rank {rank}): " if os.environ.get("WORLD_SIZE", "1") != "1" and rank != "0" else "error: "
    _say(prefix + str(error))
    return error.exit_code


def _resource_error(error: Exception) -> ResourceError | None:
    """Out of memory or disk, in the words of whichever library noticed."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"the disk is full: {error.filename or error}", hint="free some space and run again")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return ResourceError(
            f"out of memory: {error}", hint="a smaller micro batch, shorter sequences or more ranks need less"
        )
    return None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
