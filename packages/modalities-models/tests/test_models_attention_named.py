"""Implementations by name: what they refuse, what is logged, and that each gives what the definition gives."""

from __future__ import annotations

import itertools
import logging
import shutil
import sys
import types

import pytest
import torch

from modalities_core.errors import ConfigError
from modalities_models.decoder import decoder
from modalities_models.nn import attention_flash, attention_flex, attention_implementations
from modalities_models.nn.attention_flash import FLASH, document_ends
from modalities_models.nn.attention_flex import FLEX
from modalities_models.nn.attention_implementations import choose
from modalities_models.nn.attention_jobs import Job, Scores
from modalities_models.nn.attention_torch import PLAIN, SDPA
from modalities_models.nn.masks import causal, everything

SIZES = {"vocab_size": 50, "sequence_length": 160, "hidden_size": 64, "layers": 2, "heads": 4, "key_value_heads": 2}
SEGMENTS = torch.tensor([[0] * 70 + [1] + [2] * 79, [5] * 150])
PADDING = torch.tensor([0, 11])
OPTIONS = {
    "causal": {},
    "windows": {"attention_windows": (20, None)},
    "cap": {"attention_softcap": 2.0, "attention_scale": 0.4},
    "both": {"attention_windows": (129,), "attention_softcap": 2.0},
}
TOKENS = torch.randint(50, (2, 150), generator=torch.Generator().manual_seed(0))
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


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


def test_document_ends_by_hand():
    segments = torch.tensor([[4, 4, 7, 7, 7], [7, 1, 1, 2, 3]])
    ends = document_ends(causal(segments, segments_BT=segments))
    assert ends.dtype == torch.int32 and ends.tolist() == [0, 2, 5, 6, 8, 9, 10]


def stand_in(calls: list[str]) -> types.ModuleType:
    """A module with flash-attn's two functions, by the words of its documentation, in the type it is given."""

    def one(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap):
        # (T, H, F), (S, K, F): bottom right aligned, keys [i + S - T - left, i + S - T + right].
        length, total, repeats = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        scores = torch.einsum("thf,shf->hts", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        distance = torch.arange(total - length, total)[:, None] - torch.arange(total)
        seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
        left, right = window_size
        seen &= (distance <= left) if left >= 0 else True
        seen &= (-distance <= right) if right >= 0 else True
        assert dropout_p == 0.0
        return torch.einsum("hts,shf->thf", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)

    def flash_attn_func(q, k, v, **options):
        calls.append("rows")
        return torch.stack([one(*row, **options) for row in zip(q, k, v, strict=True)])

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        calls.append("documents")
        assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
        bounds = cu_seqlens_q.tolist()
        pieces = [slice(*pair) for pair in itertools.pairwise(bounds)]
        assert max(piece.stop - piece.start for piece in pieces) <= max_seqlen_q == max_seqlen_k
        return torch.cat([one(q[piece], k[piece], v[piece], **options) for piece in pieces])

    module = types.ModuleType("flash_attn")
    module.__dict__.update(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    return module


@pytest.mark.parametrize("rows", ["same", "documents", "past", "everything"])
@pytest.mark.parametrize("window", [None, 1, 20, 149])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_flash_is_called_as_its_documentation_says(rows, window, softcap, monkeypatch):
    calls: list[str] = []
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in(calls))
    generator = torch.Generator().manual_seed(0)
    total = {"past": 12 if window is None else min(10, window - 1) + 2}.get(rows, 150)
    new = 2 if rows == "past" else 150
    query = torch.randn(2, 4, new, 16, dtype=torch.float64, generator=generator)
    key, value = (torch.randn(2, 2, total, 16, dtype=torch.float64, generator=generator) for _ in range(2))
    masks = {
        "same": causal(TOKENS),
        "documents": causal(TOKENS, segments_BT=SEGMENTS),
        "past": causal(TOKENS[:, :2], past=10),
        "everything": everything(),
    }
    work = Job(masks[rows], Scores(window, 0.3, softcap), 0.0, "cuda", torch.float64, 16, True)
    torch.testing.assert_close(
        FLASH.attend(query, key, value, work), PLAIN.attend(query, key, value, work), rtol=1e-12, atol=1e-12
    )
    assert calls == (["documents"] if rows == "documents" else ["rows"])


def model_and_reference(options, device, dtype, name):
    model = decoder(**SIZES | options, attention=name).to(device, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    exact = decoder(**SIZES | options).double()
    exact.load_state_dict({key: value.double().cpu() for key, value in model.state_dict().items()})
    return model, exact


def flex_and_plain(rows, **scores):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 150, 16, generator=generator)
    key, value = (torch.randn(2, 2, 150, 16, generator=generator) for _ in range(2))
    masks = {
        "same": causal(TOKENS),
        "documents": causal(TOKENS, segments_BT=SEGMENTS),
        "padding": causal(TOKENS, padding_B=PADDING),
        "everything": everything(),
    }
    work = Job(masks[rows], Scores(**scores), 0.0, "cuda", torch.float32, 16, False)
    return [implementation.attend(query, key, value, work) for implementation in (FLEX, PLAIN)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("rows", ["same", "documents", "padding", "everything"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, 2.0)])
def test_flex_is_asked_for_the_same_attention(rows, window, softcap, monkeypatch):
    """By torch's own reading of the masks and scores, which needs no compilation."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    monkeypatch.setattr(attention_flex, "_compiled_kernel", lambda: flex_attention)
    monkeypatch.setattr(attention_flex, "_compiled_blocks", lambda: create_block_mask)
    torch.testing.assert_close(*flex_and_plain(rows, window=window, scale=0.3, softcap=softcap), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention on the CPU needs a C++ compiler")
def test_flex_compiled():
    torch.compiler.reset()
    torch.testing.assert_close(*flex_and_plain("documents", window=20, softcap=2.0), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["auto", "sdpa", "flash", "flex"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float32, 1e-2)])
def test_every_name_on_a_gpu_follows_float64(name, options, compiled, dtype, tolerance):
    """Values and gradients; the tolerance of float32 leaves room for TF32 in the kernels of FlexAttention."""
    if name == "flash":
        pytest.importorskip("flash_attn")
    torch.compiler.reset()
    model, exact = model_and_reference(OPTIONS[options], "cuda", dtype, name)
    for block in model.blocks if compiled else ():
        block.compile(fullgraph=True)
    try:
        choose(job(dtype=dtype, head_size=16, softcap=OPTIONS[options].get("attention_softcap")), name)
    except ConfigError as error:
        pytest.skip(str(error))
    for segments in (None, SEGMENTS):
        both = []
        for twin in (model, exact):
            device = next(twin.parameters()).device
            twin.zero_grad()
            hidden = twin(TOKENS.to(device), segments_BT=None if segments is None else segments.to(device))
            (hidden.double().cpu() * torch.linspace(-1, 1, 64).double()).sum().backward()
            gradients = [parameter.grad.double().cpu().flatten() for parameter in twin.parameters()]
            both.append((hidden.detach().double().cpu(), torch.cat(gradients)))
        for ours, wanted in zip(*both, strict=True):
            assert (ours - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.gpu
def test_generation_on_a_gpu_with_windows_and_padding():
    model, exact = model_and_reference(OPTIONS["both"], "cuda", torch.float32, "auto")
    with torch.no_grad():
        caches = model.new_caches()
        pieces = [model(piece, caches, padding_B=PADDING.cuda()) for piece in TOKENS.cuda().split([140, 1, 9], 1)]
        wanted = exact(TOKENS, padding_B=PADDING)
    got = torch.cat(pieces, 1).double().cpu()
    torch.testing.assert_close(got[1, 11:], wanted[1, 11:], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-2, atol=1e-2)
