"""``modalities profile`` on the quick start's document, made small."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from modalities_cli.profile import split
from modalities_core.events import StepLogged

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "model.preset=nano",
    "model.vocab_size=4096",
    "settings.sequence_length=16",
    "trainer.batches.samples_per_step=4",
]
SMALL += ["trainer.batches.micro_batch_size=2"]


def test_the_parts_of_a_step() -> None:
    seconds = {"step": 0.01, "data": 0.0001, "forward": 0.003, "backward": 0.005, "optimizer": 0.0015, "other": 0.0004}
    event = StepLogged(6, 9, 1.0, 1.0, 1e-3, 1, 1, 12_345.6, 0.5, 0, seconds)
    assert split(event) == [
        "12,346 tokens/s, MFU 50.0%, 10.0 ms per step:",
        "  data            0.10 ms    1.0%",
        "  forward         3.00 ms   30.0%",
        "  backward        5.00 ms   50.0%",
        "  optimizer       1.50 ms   15.0%",
        "  other           0.40 ms    4.0%",
    ]


@pytest.mark.slow
def test_a_profile_of_the_quick_start(modalities, small_data: Path, tmp_path: Path) -> None:
    config, overrides = ROOT / "config_files" / "quickstart.yaml", [f"settings.data={small_data}", *SMALL]
    before = sorted(path.relative_to(small_data) for path in small_data.rglob("*"))
    options = ["--steps", 2, "--warmup", 1, "--rows", 7, "--folder", tmp_path / "traces"]
    done = modalities("profile", config, *overrides, *options)
    assert done.returncode == 0, done.stderr
    assert "steps 1 to 2 warm up, 3 to 4 are timed, 5 to 6 profiled" in done.stdout
    whole = float(re.search(r"tokens/s.* ([\d,.]+) ms per step", done.stdout)[1].replace(",", ""))
    found = re.findall(r"^  (\w+) +([\d,.]+) ms +([\d.]+)%$", done.stdout, re.MULTILINE)
    parts = {name: float(time.replace(",", "")) for name, time, _ in found}
    assert list(parts) == ["data", "forward", "backward", "optimizer", "other"]
    assert sum(parts.values()) == pytest.approx(whole, rel=0.02, abs=0.2)
    assert parts["backward"] > parts["data"]
    table = done.stdout[done.stdout.index("self time on the host") :].split("\n\n")[0].splitlines()
    assert len(table) == 9
    trace = tmp_path / "traces" / "step-00000005-rank-0.json.gz"
    assert f"trace: {trace}" in done.stdout
    assert "perfetto" in done.stdout
    with gzip.open(trace, "rt") as stream:
        names = [event.get("name", "") for event in json.load(stream)["traceEvents"]]
    assert len({name for name in names if name.startswith("ProfilerStep#")}) == 2
    # Nothing else was left: neither metrics nor checkpoints, and nothing beside the data.
    assert sorted(path.name for path in (tmp_path / "traces").iterdir()) == [trace.name, trace.name[:-8] + ".txt"]
    assert sorted(path.relative_to(small_data) for path in small_data.rglob("*")) == before


@pytest.mark.slow
def test_every_rank_of_two_leaves_a_trace(torchrun, tmp_path: Path) -> None:
    config = ROOT / "config_files" / "config_lorem_ipsum.yaml"
    options = ["--steps", 1, "--warmup", 1, "--ranks", "all", "--folder", tmp_path]
    done = torchrun(2, "profile", config, "settings.sequence_length=16", *options)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("*.gz")) == [f"step-00000003-rank-{r}.json.gz" for r in (0, 1)]
    assert done.stdout.count("self time on the host") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["trainer.steps=5"], "the run has 5 steps, its profile takes 9"),
        (["--ranks", "first"], "is not a list of ranks"),
        (["--ranks", "3"], "rank 3 cannot be profiled: there are 1"),
    ],
)
def test_mistakes_are_named(modalities, tmp_path: Path, arguments: list[str], text: str) -> None:
    config = ROOT / "config_files" / "config_lorem_ipsum.yaml"
    done = modalities("profile", config, *arguments, "--folder", tmp_path)
    assert done.returncode == 2
    assert text in done.stderr
