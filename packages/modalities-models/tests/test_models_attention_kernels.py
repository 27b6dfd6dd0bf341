"""flash-attn and FlexAttention: asked for the attention that the definition gives; on a GPU, giving it."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import sys
import types

import pytest
import torch

from modalities_models.decoder import decoder
from modalities_models.nn import attention_flex
from modalities_models.nn.attention_flash import FLASH, document_ends
from modalities_models.nn.attention_flex import FLEX
from modalities_models.nn.attention_implementations import NAMED
from modalities_models.nn.attention_jobs import Job, Scores
from modalities_models.nn.attention_torch import PLAIN
from modalities_models.nn.masks import causal, everything

SIZES = {"vocab_size": 50, "sequence_length": 160, "hidden_size": 64, "layers": 2, "heads": 4, "key_value_heads": 2}
SEGMENTS = torch.tensor([[0] * 70 + [1] + [2] * 79, [5] * 150])
PADDING = torch.tensor([0, 11])
OPTIONS = {
    "causal": {},
    "windows": {"attention_windows": (20, None)},
    "cap": {"attention_softcap": 2.0, "attention_scale": 0.4},
    "both": {"attention_windows": (65,), "attention_softcap": 2.0},
}
TOKENS = torch.randint(50, (2, 150), generator=torch.Generator().manual_seed(0))


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


def flex_and_plain(rows, segments=SEGMENTS, **scores):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 150, 16, generator=generator)
    key, value = (torch.randn(2, 2, 150, 16, generator=generator) for _ in range(2))
    masks = {
        "same": causal(TOKENS),
        "documents": causal(TOKENS, segments_BT=segments),
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
def test_flex_is_compiled_once_for_any_documents():
    torch.compiler.reset()
    for again, segments in enumerate((SEGMENTS, SEGMENTS.flip(0), torch.arange(300).view(2, 150) // 7)):
        with torch._dynamo.config.patch(error_on_recompile=again > 0):
            both = flex_and_plain("documents", segments, window=20, softcap=2.0)
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_flex_inside_compiled_blocks(monkeypatch):
    """Traced whole, once for any documents; the kernels are torch's plain ones, on the CPU."""
    from torch.nn.attention.flex_attention import create_block_mask

    monkeypatch.setattr(attention_flex, "_compiled_blocks", lambda: create_block_mask)
    anywhere = dataclasses.replace(FLEX, refusal=lambda job: None)
    monkeypatch.setitem(NAMED, "flex", anywhere)
    torch.compiler.reset()
    model, exact = model_and_reference(OPTIONS["windows"] | OPTIONS["cap"], "cpu", torch.float32, "flex")
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    for again, segments in enumerate((SEGMENTS, SEGMENTS.flip(0))):
        with torch._dynamo.config.patch(error_on_recompile=again > 0):
            got = model(TOKENS, segments_BT=segments)
        torch.testing.assert_close(got.double(), exact(TOKENS, segments_BT=segments), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["auto", "sdpa", "flash", "flex"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.015), (torch.float32, 3e-3)])
def test_every_name_on_a_gpu_follows_float64(name, options, compiled, dtype, tolerance):
    """Values and gradients; without a window, documents or the cap they would differ by 0.03 to 0.4.

    On the CPU bfloat16 differs by 0.006 and float32 by 4e-7: TF32, which FlexAttention may take, needs the room.
    """
    if name == "flash":
        pytest.importorskip("flash_attn")
    torch.compiler.reset()
    model, exact = model_and_reference(OPTIONS[options], "cuda", dtype, name)
    for block in model.blocks if compiled else ():
        block.compile(fullgraph=True)
    scores = Scores(softcap=OPTIONS[options].get("attention_softcap"))
    reason = name != "auto" and NAMED[name].refusal(Job(causal(TOKENS), scores, 0.0, "cuda", dtype, 16, True))
    if reason:
        pytest.skip(reason)
    for segments in (None, SEGMENTS):
        both = []
        for twin in (model, exact):
            device = next(twin.parameters()).device
            twin.zero_grad()
            hidden = twin(TOKENS.to(device), segments_BT=None if segments is None else segments.to(device))
            (hidden.double().cpu() * torch.linspace(-1, 1, 64).double()).sum().backward()
            gradients = [parameter.grad.double().cpu().flatten() for parameter in twin.blocks.parameters()]
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
