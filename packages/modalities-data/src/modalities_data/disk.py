"""Operating-system errors as errors a user can act on."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modalities_core.errors import DataError, ModalitiesError, ResourceError

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def as_user_error(error: OSError, path: Path | str = "") -> ModalitiesError:
    """``error`` as ResourceError where the disk is full, as DataError otherwise."""
    name = error.filename or path
    if error.errno in NO_SPACE:
        return ResourceError(f"no space left to write {name}" if name else "no space left", hint="free some and rerun")
    return DataError(f"{name}: {error.strerror or error}" if name else str(error))


@contextmanager
def user_errors(path: Path | str = "") -> Iterator[None]:
    """Turn every OSError of the body into a user's error about ``path`` unless the error names its own file.

    Raises:
        ResourceError: the disk is full or the quota used up.
        DataError: anything else, such as a missing file or a lacking permission.
    """
    try:
        yield
    except OSError as error:
        raise as_user_error(error, path) from error


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Keep ``path`` from being written over by accident.

    Raises:
        DataError: it exists and may not be overwritten.
    """
    if path.exists() and not overwrite:
        raise DataError(f"{path} exists already", hint="choose another name, or pass --overwrite to replace it")
