"""What the doctor says of this machine, and of machines with something wrong."""

from __future__ import annotations

import copy
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from modalities_cli import machine
from modalities_cli.doctor import comm_lines, doctor
from modalities_core.errors import ConfigError
from modalities_parallel.communication import Collective, CommunicationReport, Slow


@pytest.fixture
def known(tmp_path: Path) -> dict[str, Any]:
    return machine.facts(tmp_path)


def test_facts_are_those_of_the_system(known: dict[str, Any], tmp_path: Path) -> None:
    assert known["versions"]["python"] == platform.python_version()
    assert known["versions"]["torch"] == torch.__version__
    assert known["cpu"]["usable_cores"] == len(os.sched_getaffinity(0))
    assert known["cpu"]["torch_threads"] == torch.get_num_threads()
    assert known["memory"]["total"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert known["memory"]["shared"] == shutil.disk_usage("/dev/shm").total
    assert known["disk"]["total"] == shutil.disk_usage(tmp_path).total
    assert known["disk"]["writable"] is True
    assert "lo" in [one["name"] for one in known["network"]["interfaces"]]
    assert len(known["devices"]) == torch.cuda.device_count()
    json.dumps(known)


def test_a_missing_extra_comes_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2.10", "wandb>=0.20; extra == 'wandb'", "a-b[c]>=1; extra == 'two'", 'rich; extra == "two"']
    monkeypatch.setattr(machine, "PACKAGES", ("modalities-core",))
    monkeypatch.setattr(machine, "requires", lambda name: lines)
    monkeypatch.setattr(machine, "installed", lambda name: None if name in ("wandb", "a-b") else "1")
    assert machine.extras() == [
        {"extra": "modalities-core[wandb]", "missing": ["wandb"], "pip": 'pip install "modalities-core[wandb]"'},
        {"extra": "modalities-core[two]", "missing": ["a-b"], "pip": 'pip install "modalities-core[two]"'},
    ]


GPU = {"name": "V100", "memory": 32 << 30, "free": 1 << 30, "compute_capability": "7.0", "bf16": False}
WRONG = [
    (("versions", "modalities-data"), "0.0.1", "do not belong together"),
    (("devices",), [GPU], "GPU 0 has no bfloat16"),
    (("devices",), [GPU], "31.0 GiB of GPU 0 are in use"),
    (("memory", "shared"), 64 << 20, "/dev/shm has 0.06 GiB"),
    (("limits", "open_files"), {"soft": 1024, "hard": 4096}, "may open 1024 files"),
    (("cpu", "torch_threads"), 10**4, "torch has 10000 threads"),
    (("clock", "synchronised"), False, "nothing keeps the clock in time"),
    (("disk", "free"), 1 << 30, "1.0 GiB are free"),
    (("disk", "writable"), False, "cannot be written to"),
    (("network", "address"), None, "resolves to no address"),
    (("network", "address"), "127.0.1.1", "resolves to 127.0.1.1"),
]


@pytest.mark.parametrize(("path", "value", "expected"), WRONG, ids=[case[2] for case in WRONG])
def test_what_is_wrong_is_found(known: dict[str, Any], path: tuple[str, ...], value: Any, expected: str) -> None:
    well = copy.deepcopy(known)
    well["clock"]["synchronised"], well["network"]["address"] = True, "10.0.0.1"
    well["cpu"] |= {"avx512_bf16": True, "torch_threads": 1}
    well["disk"]["free"], well["memory"]["shared"] = 1 << 40, 8 << 30
    well["limits"]["open_files"] = {"soft": 65536, "hard": 65536}
    well["network"]["environment"] = {}
    assert [finding.what for finding in machine.findings(well)] == []
    *parents, last = path
    inner = well
    for name in parents:
        inner = inner[name]
    inner[last] = value
    found = machine.findings(well)
    assert [finding for finding in found if expected in finding.what and finding.advice], found


def test_the_command_prints_all_of_it_or_one_json_object() -> None:
    shown = CliRunner().invoke(doctor, [])
    assert shown.exit_code == 0, shown.output
    for word in ("python", "torch", "CPU", "shared memory", "open files", "clock", "disk", "network", "finding"):
        assert word in shown.output
    value = json.loads(CliRunner().invoke(doctor, ["--json"]).output)
    assert value["versions"]["torch"] == torch.__version__
    assert all(finding.keys() == {"what", "advice"} for finding in value["findings"])


def test_nobody_to_talk_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("modalities_parallel.world.auto", lambda **_: type("Alone", (), {"close": lambda self: None})())
    with pytest.raises(ConfigError, match="nobody to talk to"):
        CliRunner().invoke(doctor, ["--comm"], catch_exceptions=False)


def test_a_slow_rank_and_a_wrong_clock_are_named() -> None:
    row = Collective("dp_shard", 2, "all_reduce", 1 << 20, 1e-3, 1.05e9)
    slow = [Slow(1, "compute", 3.0)]
    text = "\n".join(comm_lines(CommunicationReport([row], [1e-3, 3e-3], [[0, 1e-4], [1e-4, 0]], [0.0, -7.0], slow)))
    assert "dp_shard           2  all_reduce          1 MiB    1,000 us       1.05 GB/s" in text
    assert "finding: rank 1 is slow: 3.0 times the median rank's time in compute" in text
    assert "finding: the clock of rank 1 is -7.0 s off" in text
