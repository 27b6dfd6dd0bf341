"""The ``modalities`` command: every failure a user can cause is one message and one exit code."""

from __future__ import annotations

import os
import sys

# Run as a file, this folder would come first on the path and its modules would hide others of the same name.
if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]


def main() -> None:
    """Run the command line and exit with one of the codes in :mod:`modalities_core.errors`."""
    from modalities_cli.app import app
    from modalities_cli.failures import guarded

    sys.exit(guarded(lambda: app(prog_name="modalities", standalone_mode=False)))


if __name__ == "__main__":
    main()
