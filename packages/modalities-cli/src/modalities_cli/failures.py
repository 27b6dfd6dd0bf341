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
    DistributedError,
    ModalitiesError,
    ResourceError,
    first_line,
)
from modalities_parallel.root_cause import write_report


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
        write_report("interrupted")
        _say("interrupted")
        return EXIT_INTERRUPTED
    except ModalitiesError as error:
        return _report(error)
    except BrokenPipeError:
        # The reader of our output has left (a pager, `head`); nothing is wrong. Python must not flush again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except Exception as error:
        if known := _resource_error(error) or _distributed_error(error):
            return _report(known)
        write_report(traceback.format_exc())
        traceback.print_exc()
        _say("error: this is a bug in Modalities or a plugin; the traceback above shows where")
        return EXIT_BUG


def _report(error: ModalitiesError) -> int:
    write_report(str(error))
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


def _distributed_error(error: Exception) -> DistributedError | None:
    """A collective that another rank never finished, in the words of gloo, NCCL or the store."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or not isinstance(error, RuntimeError):
        return None
    text = str(error)
    of_torch = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    if not of_torch and not any(word in text for word in ("gloo/transport", "gloo/rendezvous", "NCCL communicator")):
        return None
    return DistributedError(
        f"rank {os.environ.get('RANK')} of {os.environ['WORLD_SIZE']} lost the others: {first_line(error)}",
        hint="another rank has failed or hangs: look for the first error in the logs of the other ranks",
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
