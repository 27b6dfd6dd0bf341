"""From what goes wrong to one message and the right exit code."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from modalities_cli.failures import guarded
from modalities_core import errors

CASES = [
    (errors.ConfigError("bad key", hint="mend it"), 2, "error: bad key\n  mend it\n"),
    (errors.DataError("no file"), 3, "error: no file\n"),
    (errors.CheckpointError("damaged"), 4, "error: damaged\n"),
    (errors.ResourceError("full"), 5, "error: full\n"),
    (errors.DistributedError("rank 1"), 6, "error: rank 1\n"),
    (errors.NumericalError("nan"), 7, "error: nan\n"),
    (errors.Preempted("saved"), 75, "error: saved\n"),
    (errors.Interrupted("saved"), 130, "error: saved\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
    (OSError(errno.ENOSPC, "No space left on device", "/x"), 5, "error: the disk is full: /x"),
    (MemoryError("alloc"), 5, "error: out of memory: alloc"),
    (click.UsageError("what"), 2, "Error: what\n"),
]


def raising(error: BaseException) -> Callable[[], object]:
    def command() -> object:
        raise error

    return command


@pytest.mark.parametrize(("error", "code", "message"), CASES, ids=[type(case[0]).__name__ for case in CASES])
def test_each_failure_has_its_code(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(raising(error)) == code
    shown = capsys.readouterr().err
    assert shown.startswith(message)
    assert "Traceback" not in shown


def test_a_bug_of_ours_shows_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(raising(ZeroDivisionError("oops"))) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "this is a bug" in shown


def test_other_ranks_leave_a_wrong_document_to_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert guarded(raising(errors.ConfigError("bad key"))) == 2
    assert capsys.readouterr().err == ""
    assert guarded(raising(errors.CheckpointError("damaged"))) == 4
    assert capsys.readouterr().err == "error (rank 1): damaged\n"


def test_success_is_zero() -> None:
    assert guarded(lambda: None) == 0


def test_a_collective_that_another_rank_left_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")
    assert guarded(raising(lost)) == 1
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    capsys.readouterr()
    assert guarded(raising(lost)) == 6
    assert "rank 0 of 2 lost the others" in capsys.readouterr().err
    assert guarded(raising(RuntimeError("shapes differ"))) == 1


@pytest.mark.parametrize("error", [errors.DataError("no file"), ZeroDivisionError("oops"), KeyboardInterrupt()])
def test_who_launched_a_rank_is_told_why_it_failed(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "report.json"))
    guarded(raising(error))
    said = json.loads((tmp_path / "report.json").read_text())["message"]
    assert (str(error) or "interrupted") in said
