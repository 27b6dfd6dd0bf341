"""The folder of a run: what was asked for, by which code, where."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from modalities_core.config.document import Document
from modalities_core.files import write_json, write_text

_SECRET_OPTIONS = ("key", "token", "secret", "password", "auth", "credential")


def describe(folder: Path, document: Document, ranks: int) -> None:
    """Write ``config.yaml`` (as given), ``config.resolved.yaml`` and ``manifest.json`` into ``folder``."""
    write_text(folder / "config.yaml", document.text)
    write_text(folder / "config.resolved.yaml", document.dump())
    write_json(folder / "manifest.json", _manifest(document, ranks))


def config_hash(document: Document) -> str:
    """SHA-256 of the document with ``extends`` and overrides applied, independent of the folder it lies in."""
    text = "\n".join(line for line in document.dump().splitlines() if not line.startswith("relative_to:"))
    return hashlib.sha256(text.encode()).hexdigest()


def _manifest(document: Document, ranks: int) -> dict[str, Any]:
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": [_without_secret(argument) for argument in sys.argv],
        "overrides": document.overrides,
        "config_hash": config_hash(document),
        "ranks": ranks,
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "git_commit": _git_commit(),
        "working_folder": os.getcwd(),
        "packages": dict(sorted((item.name, item.version) for item in distributions() if item.name)),
    }


def _without_secret(argument: str) -> str:
    name, equals, _ = argument.partition("=")
    return f"{name}=***" if equals and any(word in name.lower() for word in _SECRET_OPTIONS) else argument


def _git_commit() -> str | None:
    """The commit of the working folder, marked where files differ from it; None outside a checkout."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
