"""Samples of text during a run: what they say, that they cost the run nothing, and that sharded ranks agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from modalities_core.errors import ConfigError, NumericalError
from modalities_core.events import Generated, Warned
from modalities_core.interfaces import Training
from modalities_core.training.samples import Samples

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "config_files" / "config_lorem_ipsum.yaml"
SHORT = [
    "settings.steps=6",
    "settings.sequence_length=32",
    "trainer.log_every=1",
    "trainer.evaluations=[]",
    "trainer.schedule={component: schedule.constant}",
]
GENERATOR = '{component: generation.text, model: "${model}", tokenizer: "${tokenizer}", max_new_tokens: 40}'
HOOK = f"{{component: hook.samples, every: 2, prompts: ['lorem ', ''], generator: {GENERATOR}}}"


def records(folder: Path, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def losses(folder: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["gradient_norm"]) for line in records(folder, "step_logged")]


def texts(folder: Path) -> list[tuple[int, str, str]]:
    return [(line["step"], line["prompt"], line["text"]) for line in records(folder, "generated")]


@pytest.mark.slow
def test_a_run_with_samples_is_bit_identical_and_shows_them(modalities, tmp_path: Path) -> None:
    # Windows of 32 bytes: the text outgrows them.
    for name, hooks in (("without", "[]"), ("with", f"[{HOOK}]")):
        done = modalities("run", CONFIG, "--folder", tmp_path / name, *SHORT, f"trainer.hooks={hooks}")
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    found = texts(tmp_path / "with")
    assert [(step, prompt) for step, prompt, _ in found] == [(s, p) for s in (2, 4, 6) for p in ("lorem ", "")]
    assert "step 6  sample:\n    lorem " in done.stdout
    # The oracle is the command that continues texts from a checkpoint.
    options = ["--max-new-tokens", 40, "--temperature", 0.8, "--json", "--prompt", "lorem ", "--prompt", ""]
    written = modalities("generate", tmp_path / "with", *options)
    assert written.returncode == 0, written.stderr
    expected = [json.loads(line)["text"] for line in written.stdout.splitlines()]
    assert [text for step, _, text in found if step == 6] == expected


@pytest.mark.slow
def test_ranks_that_share_a_model_agree(torchrun, tmp_path: Path) -> None:
    for ranks, name, hooks in ((1, "one", f"[{HOOK}]"), (2, "two", f"[{HOOK}]"), (2, "without", "[]")):
        done = torchrun(ranks, "run", CONFIG, "--folder", tmp_path / name, *SHORT, f"trainer.hooks={hooks}")
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == losses(tmp_path / "without")
    # The same weights up to rounding, so the same tokens unless one of 240 draws falls on a border.
    assert texts(tmp_path / "one") == texts(tmp_path / "two")


class Emitted(list):
    def training(self, steps: int) -> Training:
        return Training(Path("."), None, None, 0, steps, self.append)  # type: ignore[arg-type]


def test_when_samples_are_due() -> None:
    events = Emitted()
    hook = Samples(lambda prompts: [prompt.upper() for prompt in prompts], ["a", "b"], every=3)
    hook.start(events.training(7))
    for step in range(1, 8):
        hook.after_step(step)
    hook.close()
    assert events == [Generated(step, text, text.upper()) for step in (3, 6, 7) for text in ("a", "b")]


def test_weights_that_are_not_numbers_are_left_to_the_trainer() -> None:
    def broken(prompts):
        raise NumericalError("the model gave logits that are not numbers")

    events = Emitted()
    hook = Samples(broken, ["a"], every=1)
    hook.start(events.training(1))
    hook.after_step(1)
    assert [type(event) for event in events] == [Warned]


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="nothing to continue"):
        Samples(list, [], 1)
    with pytest.raises(ConfigError, match="every has to be"):
        Samples(list, ["a"], 0)


def test_a_text_ends_with_its_document_and_the_model_is_as_it_was() -> None:
    from modalities_data.tokenizers.bytes import BytesTokenizer
    from modalities_models.decoder import decoder
    from modalities_models.generation import generate_batch
    from modalities_models.generation.samples import text
    from modalities_models.generation.sampling import Sampling

    tokenizer = BytesTokenizer()
    model = decoder("nano", vocab_size=257, sequence_length=640)
    model.train()
    for block in model.blocks:
        block.compile(backend="eager")
    model(torch.zeros(1, 32, dtype=torch.int64))
    state, compiled = torch.get_rng_state(), torch._dynamo.utils.counters["frames"]["total"]
    assert compiled
    (found,) = text(model, tokenizer, max_new_tokens=600, temperature=1.0)(["abc"])
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert torch._dynamo.utils.counters["frames"]["total"] == compiled
    # The oracle ends at the end of the document by itself.
    prompt = [tokenizer.end_of_document, *tokenizer.encode("abc")]
    ends = generate_batch(model, [prompt], 600, Sampling(), [0], [tokenizer.end_of_document])
    expected = list(ends)
    assert expected[-1].finish == "end"
    assert found == tokenizer.decode([new.token for new in expected if new.token is not None])
    with pytest.raises(ConfigError, match="at least 1"):
        text(model, tokenizer, max_new_tokens=0)
