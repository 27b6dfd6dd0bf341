"""Files at an address, such as ``s3://bucket/name`` or ``https://...``, through fsspec."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal, NamedTuple

from modalities_core.errors import ConfigError, DataError, ModalitiesError


class Listing(NamedTuple):
    """What a user's words stand for.

    kind: of what was named.
    name: of the folder or file, as the entries spell it.
    entries: path or address, size and version of every file, unsorted.
    """

    kind: Literal["file", "folder", "pattern"]
    name: str
    entries: list[tuple[str, int, str]]


def is_address(name: str) -> bool:
    """Whether ``name`` is an address rather than a path of this machine."""
    return "://" in name


@contextmanager
def remote_errors(name: str) -> Iterator[None]:
    """Turn whatever a file system of fsspec raises into DataError; operating-system errors stay what they are."""
    try:
        yield
    except FileNotFoundError as error:
        if error.strerror:
            raise
        # Some clients raise it, with the address alone, for a server that does not answer too.
        why = f" ({error.__cause__})" if error.__cause__ else ""
        raise DataError(f"{name}: there is no such file{why}") from error
    except (ModalitiesError, OSError):
        raise
    except Exception as error:  # each protocol brings the errors of its own client
        raise DataError(f"{name}: {type(error).__name__}: {error}") from error


def file_system(address: str) -> tuple[Any, str]:
    """The fsspec file system of ``address``, and the path in it.

    Raises:
        ConfigError: fsspec or the protocol's client is not installed, or the protocol is unknown.
    """
    try:
        import fsspec
    except ImportError:
        raise ConfigError(f"reading {address} needs fsspec", hint='pip install "modalities-data[remote]"') from None
    try:
        return fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"cannot read {address}: {error}") from error


def open_remote(address: str) -> BinaryIO:
    """A stream over the bytes at ``address``, read ahead in blocks."""
    with remote_errors(address):
        system, path = file_system(address)
        return system.open(path, "rb", cache_type="readahead")


def list_remote(address: str) -> Listing:
    """The file, every file in the folder, or every match of a pattern.

    Raises:
        DataError: nothing is there, or it cannot be reached.
    """
    with remote_errors(address):
        system, path = file_system(address)
        if address.startswith(("http://", "https://")):
            # Web servers have no folders, and question marks begin a query.
            kind, found = "file", {path: system.info(path)}
        elif any(character in path for character in "*?["):
            kind, found = "pattern", system.glob(path, detail=True)
        elif system.isdir(path):
            kind, found = "folder", system.find(path, detail=True)
        else:
            kind, found = "file", {path: system.info(path)}
        files = {name: info for name, info in found.items() if info["type"] == "file"}
        entries = [(system.unstrip_protocol(name), *_size_and_version(name, info)) for name, info in files.items()]
        return Listing(kind, system.unstrip_protocol(path), entries)  # type: ignore[arg-type]


def _size_and_version(name: str, info: dict[str, Any]) -> tuple[int, str]:
    """What a file system tells, whatever it calls it."""
    if info.get("size") is None:
        raise DataError(f"{name}: the server does not tell its size", hint="download it first")
    version = next((info[key] for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified") if key in info), "")
    return int(info["size"]), str(version)
