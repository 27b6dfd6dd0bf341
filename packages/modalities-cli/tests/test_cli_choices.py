"""What packages log of their choices is shown by a run, once, on standard error."""

from __future__ import annotations

import logging

import pytest

from modalities_cli.choices import show_choices


@pytest.fixture
def logger():
    logger = logging.getLogger("modalities")
    before, level = list(logger.handlers), logger.level
    yield logger
    logger.handlers[:], logger.level = before, level


def test_choices_are_shown_once(logger, capsys):
    show_choices()
    show_choices()
    logger.info("attention: %s", "sdpa")
    logger.debug("not shown")
    shown = capsys.readouterr()
    assert (shown.err, shown.out) == ("attention: sdpa\n", "")
