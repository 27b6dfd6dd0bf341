"""Implementations by name: what they refuse, which one is taken, and what is logged."""

from __future__ import annotations

import logging

import pytest
import torch

from modalities_core.errors import ConfigError
from modalities_models.decoder import decoder
from modalities_models.nn import attention_flash, attention_implementations
from modalities_models.nn.attention_flash import FLASH
from modalities_models.nn.attention_flex import FLEX
from modalities_models.nn.attention_implementations import choose
from modalities_models.nn.attention_jobs import Job, Scores
from modalities_models.nn.attention_torch import SDPA
from modalities_models.nn.masks import causal, everything

SIZES = {"vocab_size": 50, "sequence_length": 160, "hidden_size": 64, "layers": 2, "heads": 4, "key_value_heads": 2}
SEGMENTS = torch.tensor([[0] * 70 + [1] + [2] * 79, [5] * 150])
PADDING = torch.tensor([0, 11])
TOKENS = torch.randint(50, (2, 150), generator=torch.Generator().manual_seed(0))


def job(device="cuda", dtype=torch.bfloat16, dropout=0.0, head_size=64, mask=None, gradient=True, **scores):
    mask = mask or causal(torch.zeros(2, 150))
    return Job(mask, Scores(**scores), dropout, device, dtype, head_size, gradient)


@pytest.mark.parametrize(
    ("implementation", "work", "reason"),
    [
        (FLASH, job(device="cpu"), "needs a CUDA GPU, and this is cpu"),
        (FLASH, job(dtype=torch.float32), "takes float16 and bfloat16, not float32"),
        (FLASH, job(head_size=512), "heads of up to 256 elements, not 512"),
        (FLASH, job(mask=causal(torch.zeros(2, 4), padding_B=PADDING)), "no padding"),
        (FLASH, job(softcap=2.0, dropout=0.1), "no dropout together with a soft cap"),
        (FLASH, job(window=3, softcap=2.0), None),
        (FLASH, job(dropout=0.1, mask=causal(torch.zeros(2, 1), past=9)), None),
        (FLEX, job(device="mps"), "needs a CUDA GPU, and this is mps"),
        (FLEX, job(device="cpu"), "no backward pass on the CPU"),
        (FLEX, job(dtype=torch.float64), "up to 32 bits, not float64"),
        (FLEX, job(head_size=8), "at least 16 elements, not 8"),
        (FLEX, job(dropout=0.1), "no dropout"),
        (FLEX, job(mask=causal(torch.zeros(2, 1), past=9)), "not for tokens that follow a cache"),
        (FLEX, job(window=3, softcap=2.0, mask=causal(torch.zeros(2, 4), padding_B=PADDING)), None),
        (SDPA, job(softcap=2.0), "no soft cap"),
        (SDPA, job(window=2, dropout=0.1), None),
    ],
)
def test_each_says_what_it_cannot_do(implementation, work, reason, monkeypatch):
    monkeypatch.setattr(attention_flash, "_INSTALLED", True)
    assert (implementation.refusal(work) is None) == (reason is None)
    if reason is not None:
        assert reason in implementation.refusal(work)


@pytest.mark.parametrize(
    ("work", "with_flash", "without"),
    [
        (job(), "sdpa", "sdpa"),
        (job(dropout=0.1), "sdpa", "sdpa"),
        (job(mask=everything()), "sdpa", "sdpa"),
        (job(window=20), "flash", "flex"),
        (job(window=150), "sdpa", "sdpa"),
        (job(window=20, dtype=torch.float32), "flex", "flex"),
        (job(window=20, dtype=torch.float64), "sdpa", "sdpa"),
        (job(window=20, dropout=0.1), "flash", "sdpa"),
        (job(softcap=20.0), "flash", "flex"),
        (job(softcap=20.0, dropout=0.1), "plain", "plain"),
        (job(mask=causal(torch.zeros(2, 150), segments_BT=SEGMENTS)), "flex", "flex"),
        (job(mask=causal(torch.zeros(2, 150), segments_BT=SEGMENTS), dropout=0.1), "flash", "sdpa"),
        (job(mask=causal(torch.zeros(2, 150), padding_B=PADDING)), "flex", "flex"),
        (job(mask=causal(torch.zeros(2, 1), past=7)), "sdpa", "sdpa"),
        (job(mask=causal(torch.zeros(2, 1), past=7), softcap=3.0), "plain", "plain"),
        (job(device="mps", window=20), "sdpa", "sdpa"),
        (job(device="mps", softcap=2.0), "plain", "plain"),
    ],
)
def test_auto_on_other_devices(work, with_flash, without, monkeypatch):
    monkeypatch.setattr(attention_flash, "_INSTALLED", True)
    assert choose(work).name == with_flash
    monkeypatch.setattr(attention_flash, "_INSTALLED", False)
    assert choose(work).name == without


def test_training_with_a_name_that_does_not_fit_is_refused_with_what_to_do(monkeypatch):
    with pytest.raises(ConfigError, match="flash cannot be used .* needs a CUDA GPU") as caught:
        decoder(**SIZES, attention="flash")(TOKENS)
    assert "attention: auto" in caught.value.hint
    with pytest.raises(ConfigError, match="flex cannot be used .* no backward pass on the CPU"):
        decoder(**SIZES, attention="flex")(TOKENS)
    with pytest.raises(ConfigError, match="sdpa cannot be used .* no soft cap"):
        decoder(**SIZES, attention="sdpa", attention_softcap=3.0)(TOKENS)
    monkeypatch.setattr(attention_flash, "_INSTALLED", False)
    with pytest.raises(ConfigError, match=r"flash-attn is not installed \(pip install modalities-models\[flash\]\)"):
        choose(job(), "flash")


def test_what_is_taken_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(attention_implementations, "_announced", set())
    model = decoder(**SIZES, attention_windows=(20, None))
    with caplog.at_level(logging.INFO, "modalities"):
        for _ in range(2):
            model(TOKENS)
        with torch.autocast("cpu", torch.bfloat16):
            model(TOKENS)
        caches = model.new_caches()
        model(TOKENS[:, :30], caches)
        model(TOKENS[:, 30:], caches)
    assert caplog.messages == [
        "attention: chunks for causal with a window of 20, float32 on cpu",
        "attention: sdpa for causal, float32 on cpu",
        "attention: chunks for causal with a window of 20, bfloat16 on cpu",
        "attention: chunks for causal, bfloat16 on cpu",
    ]


def test_a_model_trained_with_flash_is_read_without_it(caplog, monkeypatch):
    monkeypatch.setattr(attention_implementations, "_announced", set())
    model = decoder(**SIZES, attention="flash")
    with torch.no_grad(), caplog.at_level(logging.INFO, "modalities"):
        read = model(TOKENS)
    assert "sdpa for causal, float32 on cpu instead of flash: flash-attn needs a CUDA GPU" in caplog.text
    torch.testing.assert_close(read, decoder(**SIZES)(TOKENS))


def test_shapes_are_followed_anywhere():
    with torch.device("meta"):
        model = decoder(**SIZES, attention="flash", attention_windows=(20, None))
        assert model(torch.zeros(2, 150, dtype=torch.int64)).shape == (2, 150, 64)
