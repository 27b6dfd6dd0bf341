"""A run of several ranks as a folder of Hugging Face's, made by one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "config_files" / "config_lorem_ipsum.yaml"


@pytest.mark.slow
def test_a_run_of_two_ranks_is_exported_by_one_and_trains_on(torchrun, modalities, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from modalities_cli.wiring import open_run, trained_model

    run, exported, start = tmp_path / "run", tmp_path / "exported", tmp_path / "start"
    assert torchrun(2, "run", CONFIG, "--folder", run, "settings.steps=20").returncode == 0
    assert len(list((run / "checkpoints" / "step-00000020").glob("*.distcp"))) == 2
    done = modalities("export", run, exported)
    assert done.returncode == 0 and "logits equal those of transformers" in done.stdout, done.stderr

    ours = trained_model(open_run(run), run)[0].eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    tokens = torch.tensor([[256, *b"lorem ipsum dolor"]])
    with torch.no_grad():
        torch.testing.assert_close(ours.head(ours(tokens)), theirs(tokens).logits, rtol=1e-5, atol=1e-5)

    # The weights are the start of another run on two ranks, which begins where this one stood.
    done = modalities("import", exported, start)
    assert done.returncode == 0, done.stderr
    options = [f"model.model={{component: model.pretrained, path: {start}}}", "settings.steps=1"]
    options += ["trainer.schedule={component: schedule.constant}", "trainer.optimizer.lr=1e-9"]
    done = torchrun(2, "run", CONFIG, "--folder", tmp_path / "on", *options)
    assert done.returncode == 0, done.stderr
    after = trained_model(open_run(tmp_path / "on"), tmp_path / "on")[0].state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-7)
