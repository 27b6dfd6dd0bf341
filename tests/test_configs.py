"""Every shipped configuration: valid, short, runnable, and strict about each of its keys."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from modalities_cli.wiring import run_roots
from modalities_core.config.document import load, parse
from modalities_core.config.graph import Graph
from modalities_core.config.schema import json_schema
from modalities_core.errors import ConfigError
from modalities_core.registry import registry

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(ROOT.glob("config_files/*.yaml"))
# What makes a configuration small enough for two steps on a CPU.
SMALL = {
    "quickstart": ["model.vocab_size=4096"],
    "config_lorem_ipsum": [],
    "huggingface": ["settings.sequence_length=32"],
    "llama_1b_fsdp": [
        "model.model.preset=nano",
        "model.model.vocab_size=4096",
        "settings.sequence_length=64",
        "settings.micro_batch_size=2",
        "trainer.batches.samples_per_step=4",
    ],
    "llama_8b_mesh": [
        "model.model.preset=nano",
        "model.model.vocab_size=4096",
        "model.model.tied_embeddings=false",
        "settings.sequence_length=64",
        "trainer.batches.samples_per_step=4",
        "trainer.executor.compile=none",
        "world.tp=2",
    ],
}
RANKS = {"llama_8b_mesh": 4}
"""Of those that do not run in one process."""


def overrides_for(config: Path, data: Path) -> list[str]:
    needs_data = "settings.data" in config.read_text()
    return [*SMALL[config.stem], *([f"settings.data={data}"] if needs_data else [])]


def test_every_configuration_is_among_the_tested() -> None:
    assert {config.stem for config in CONFIGS} == set(SMALL)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_form_is_valid_for_us_and_for_the_json_schema(config: Path, tmp_path: Path) -> None:
    document = load(config)
    Graph(document, registry(), run_roots()).check()
    import jsonschema

    schema = json_schema(registry(), run_roots())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(yaml.safe_load(json.dumps(document.tree)))


def test_a_typical_fsdp_configuration_fits_on_one_screen() -> None:
    text = (ROOT / "config_files" / "llama_1b_fsdp.yaml").read_text()
    assert len(text.splitlines()) <= 60
    for part in ("model.decoder", "parallel.fsdp2", "evaluation.", "checkpoints.", "sink."):
        assert part in text


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_two_steps_run(config: Path, small_data: Path, modalities, torchrun, tmp_path: Path) -> None:
    overrides = overrides_for(config, small_data)
    checked = modalities("check", config, *overrides)
    assert checked.returncode == 0, checked.stderr
    options = ("--folder", tmp_path / "run", "settings.steps=2", *_short(config), *overrides)
    ranks = RANKS.get(config.stem)
    done = modalities("run", config, *options) if ranks is None else torchrun(ranks, "run", config, *options)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"


def _short(config: Path) -> list[str]:
    """Schedules whose parts have to fit into two steps."""
    schedule = load(config).tree["trainer"]["schedule"]
    return [f"trainer.schedule.{name}=1" for name in ("warmup_steps", "decay_steps") if name in schedule]


def keys_of(text: str) -> list[tuple[int, int, str]]:
    """Line, column and name of all keys but those of a ``config``, which are the names of another library."""
    found = []
    deeper = ""
    for number, line in enumerate(text.splitlines()):
        if deeper and line.startswith(deeper):
            continue
        deeper = re.match(r" *", line)[0] + " " if line.strip() == "config:" else ""
        if not line.lstrip().startswith("#"):
            matches = re.finditer(r"(?:^[\s-]*|[{,]\s*)(\w+):(?=\s|$)", line)
            found += [(number, match.start(1), match.group(1)) for match in matches]
    return found


ALL_KEYS = [(config, *place) for config in CONFIGS for place in keys_of(config.read_text())]


@settings(max_examples=60, deadline=None)
@given(place=st.sampled_from(ALL_KEYS), seed=st.integers(0, 10**6))
def test_any_key_misspelt_by_one_letter_is_refused_with_the_right_suggestion(
    place: tuple[Path, int, int, str], seed: int
) -> None:
    refused_with_suggestion(*place, seed)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_each_key_misspelt_by_one_letter_is_refused_with_the_right_suggestion(config: Path) -> None:
    for place in keys_of(config.read_text()):
        for seed in range(3):
            refused_with_suggestion(config, *place, seed)


def refused_with_suggestion(config: Path, number: int, column: int, key: str, seed: int) -> None:
    lines = config.read_text().splitlines()
    wrong = misspelt(key, random.Random(seed), taken={place[-1] for place in keys_of(config.read_text())})
    lines[number] = lines[number][:column] + wrong + lines[number][column + len(key) :]
    document = parse("\n".join(lines) + "\n", config.name, config.parent)
    graph = Graph(document, registry(), run_roots())
    with pytest.raises(ConfigError) as caught:
        graph.check()
    text = str(caught.value)
    # Either the misspelt key is named with the right one, or a reference to the right one with the misspelt.
    assert wrong in text, text
    # Axes of the mesh are two letters each, of which one misspelt may be nearer to another.
    right = ("cp", "ep", "pp", "tp") if key in ("cp", "pp", "tp") else (key,)
    assert any(f"`{name}`" in text or f".{name}`" in text for name in right), text


def misspelt(key: str, chance: random.Random, taken: set[str]) -> str:
    """``key`` with one letter replaced, dropped, inserted, or two neighbours swapped; never another key in use."""
    while True:
        at = chance.randrange(len(key))
        letter = chance.choice("abcdefghijklmnopqrstuvwxyz")
        wrong = chance.choice(
            [
                key[:at] + letter + key[at + 1 :],
                key[:at] + key[at + 1 :],
                key[:at] + letter + key[at:],
                key[:at] + key[at : at + 2][::-1] + key[at + 2 :],
            ]
        )
        # YAML reads some short words as something else than text.
        if wrong not in taken | {"", key, "y", "n", "null", "true", "false"}:
            return wrong
