"""The ``modalities-data`` script."""

from __future__ import annotations

import logging
import sys

import click

from modalities_core.errors import EXIT_INTERRUPTED, EXIT_RESOURCE, ModalitiesError
from modalities_data.commands import data
from modalities_data.disk import as_user_error


def main() -> None:
    """Run the command line; user mistakes end with one line on stderr and their exit code, without a traceback."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    sys.exit(_run())


def _run() -> int:
    try:
        code = data.main(prog_name="modalities-data", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except ModalitiesError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever read our output has had enough
        sys.stderr.close()
        return 0
    except OSError as error:
        failure = as_user_error(error)
        print(f"error: {failure}", file=sys.stderr)
        return failure.exit_code
    except MemoryError:
        print("error: out of memory", file=sys.stderr)
        return EXIT_RESOURCE
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    main()
