"""What the packages choose for a run, shown to whoever started it."""

from __future__ import annotations

import logging

import click


class _Said(logging.Handler):
    """Prints records on standard error as it is at that moment: a progress bar may have put itself in between."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        click.echo(self.format(record), err=True)


def show_choices() -> None:
    """From now on show what the packages log of their choices, such as the implementation of attention."""
    logger = logging.getLogger("modalities")
    if not any(isinstance(handler, _Said) for handler in logger.handlers):
        logger.addHandler(_Said())
        logger.setLevel(logging.INFO)
