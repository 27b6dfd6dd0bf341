"""Attention against the definition in float64: every implementation, mask and option, values and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from modalities_models.decoder import decoder
from modalities_models.nn import chunked_attention as chunked_module
from modalities_models.nn.attention_implementations import attend, choose
from modalities_models.nn.attention_jobs import Job, Scores
from modalities_models.nn.attention_torch import CHUNKED, PLAIN, SDPA
from modalities_models.nn.chunked_attention import chunk_size, chunked_attention, chunks, pieces
from modalities_models.nn.masks import causal, everything

IMPLEMENTATIONS = {"chunks": CHUNKED, "sdpa": SDPA, "plain": PLAIN}


def heads(batch: int, count: int, length: int, size: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(batch, length, count, size, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).transpose(1, 2).requires_grad_()


def definition(query, key, value, seen, scale=None, softcap=None):
    """The formula of arXiv:1706.03762, section 3.2.1, with what is not seen masked; key heads are repeated."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value


def compare(attention, query, key, value, seen, tolerance, **options):
    exact = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    wanted, got = definition(*exact, seen, **options), attention(query, key, value)
    direction = torch.randn(got.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    wanted_gradients = torch.autograd.grad(wanted, exact, direction)
    gradients = torch.autograd.grad(got, [query, key, value], direction.to(got.dtype))
    for ours, theirs in zip((got, *gradients), (wanted, *wanted_gradients), strict=True):
        assert ours.dtype == query.dtype and ours.shape == theirs.shape
        # With a window of one token the gradients of query and key are 0.
        assert (ours.double() - theirs).norm() <= tolerance * (theirs.norm() + 3)


TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.03}
SEGMENTS = torch.tensor([[0] * 30 + [1] * 1 + [2] * 99, [0] * 130])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize("window", [None, 1, 20, 65, 1000])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("rows", ["same", "documents", "padding"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_implementation_follows_the_definition(name, rows, softcap, window, key_heads, dtype):
    query, key, value = (heads(2, n, 130, 16, seed, dtype) for seed, n in enumerate((4, key_heads, key_heads)))
    segments = SEGMENTS if rows == "documents" else None
    padding = torch.tensor([0, 7]) if rows == "padding" else None
    mask = causal(torch.zeros(2, 130), 0, segments, padding)
    job = Job(mask, Scores(window, 0.4, softcap), 0.0, "cpu", dtype, 16, True)
    if name == "sdpa" and softcap is not None:
        assert "no soft cap" in str(SDPA.refusal(job))
        return
    if name == "chunks" and softcap is None and window is None and dtype != torch.bfloat16:
        assert "slower" in str(CHUNKED.refusal(job))
    seen = dense_by_rule(130, window, segments, padding)
    implementation = IMPLEMENTATIONS[name]
    compare(
        lambda *heads: implementation.attend(*heads, job),
        query,
        key,
        value,
        seen,
        TOLERANCES[dtype],
        scale=0.4,
        softcap=softcap,
    )


def dense_by_rule(length, window, segments, padding):
    """(B, 1, T, T) booleans: who sees whom."""
    query, key = torch.arange(length)[:, None], torch.arange(length)
    seen = ((key <= query) & (query - key < (window or length))).expand(2, 1, length, length)
    if segments is not None:
        seen = seen & (segments[:, None, :, None] == segments[:, None, None, :])
    if padding is not None:
        seen = seen & ((key >= padding[:, None, None, None]) | (key == query))
    return seen


@pytest.mark.parametrize(("new", "total"), [(1, 1), (1, 9), (4, 9), (9, 9)])
@pytest.mark.parametrize("key_heads", [1, 4])
@pytest.mark.parametrize("softcap", [None, 1.0])
def test_attention_of_the_last_tokens_follows_the_definition(new, total, key_heads, softcap):
    query = heads(2, 4, new, 8, 0, torch.float64)
    key, value = (heads(2, key_heads, total, 8, seed, torch.float64) for seed in (1, 2))
    mask = causal(query[:, 0, :, 0], total - new)
    seen = torch.arange(total) <= torch.arange(total - new, total)[:, None]
    compare(
        lambda *heads: attend(*heads, mask, Scores(softcap=softcap)), query, key, value, seen, 1e-13, softcap=softcap
    )


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_where_all_see_all(softcap):
    query, key, value = (heads(2, 4, 20, 8, seed, torch.float64) for seed in range(3))
    compare(
        lambda *heads: attend(*heads, everything(), Scores(softcap=softcap)),
        query,
        key,
        value,
        torch.ones(20, 20, dtype=torch.bool),
        1e-13,
        softcap=softcap,
    )


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_weights_made_again_are_those_that_were_kept(softcap, monkeypatch):
    tensors = [heads(2, n, 200, 16, seed, torch.float32) for seed, n in enumerate((4, 2, 2))]
    kept = torch.autograd.grad(chunked_attention(*tensors, window=50, softcap=softcap).square().sum(), tensors)
    monkeypatch.setattr(chunked_module, "MOST_KEPT", 0)
    again = torch.autograd.grad(chunked_attention(*tensors, window=50, softcap=softcap).square().sum(), tensors)
    assert all(torch.equal(*pair) for pair in zip(kept, again, strict=True))


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"window": 50}])
@pytest.mark.parametrize("size", [1, 6 * 200 * 128 * 4, 20 * 200 * 128 * 4])
@pytest.mark.parametrize("most_kept", [0, 640])
@pytest.mark.parametrize("segments", [False, True])
def test_pieces_give_what_the_whole_gives(options, size, most_kept, segments, monkeypatch):
    tensors = [heads(5, n, 200, 16, seed, torch.float64) for seed, n in enumerate((6, 3, 3))]
    hidden = None
    if segments:
        numbers = (torch.rand(5, 200, generator=torch.Generator().manual_seed(1)) < 0.05).cumsum(1)
        hidden = causal(torch.zeros(5, 200), segments_BT=numbers).hidden(options.get("window"))
    monkeypatch.setattr(chunked_module, "MOST_KEPT", most_kept)
    results = []
    for piece_bytes in (1 << 40, size):
        monkeypatch.setattr(chunked_module, "PIECE_BYTES", piece_bytes)
        mixed = chunked_attention(*tensors, hidden, **options)
        results.append((mixed, *torch.autograd.grad(mixed.square().sum(), tensors)))
    for whole, parted in zip(*results, strict=True):
        torch.testing.assert_close(parted, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("batch", "count", "size"), [(8, 6, 1), (8, 6, 1 << 20), (3, 7, 3 << 19), (1, 4, 1 << 30), (0, 4, 9)]
)
def test_pieces_cover_every_head_once(batch, count, size):
    covered = torch.zeros(batch, count)
    for piece in pieces(batch, count, size):
        covered[piece] += 1
        assert covered[piece].numel() * size <= torch.get_num_threads() * (2 << 20) or covered[piece].numel() == 1
    assert (covered == 1).all()


@pytest.mark.parametrize("window", [None, 1, 64, 100, 5000])
@pytest.mark.parametrize("length", [1, 2, 64, 65, 256, 513, 1000, 1024, 4096])
def test_chunks_cover_the_sequence_once(length, window):
    parts = chunks(length, window, chunk_size(length, window))
    assert [index for start, end, _ in parts for index in range(start, end)] == list(range(length))
    assert all(first == max(0, start - (window or length) + 1) for start, _, first in parts)
    assert len(parts) <= (8 if window is None else max(8, -(-length // 64)))


def job(window=None, softcap=None, dropout=0.0, dtype=torch.float32, gradient=True, length=64, mask=None):
    mask = mask or causal(torch.zeros(1, length))
    return Job(mask, Scores(window, None, softcap), dropout, "cpu", dtype, 16, gradient)


@pytest.mark.parametrize(
    ("work", "name"),
    [
        (job(), "sdpa"),
        (job(length=512), "chunks"),
        (job(length=2048), "sdpa"),
        (job(dtype=torch.float64, length=512), "sdpa"),
        (job(dtype=torch.bfloat16), "chunks"),
        (job(dtype=torch.bfloat16, gradient=False), "sdpa"),
        (job(dtype=torch.bfloat16, dropout=0.1), "sdpa"),
        (job(dtype=torch.bfloat16, length=4096), "sdpa"),
        (job(dtype=torch.bfloat16, length=1), "sdpa"),
        (job(window=16), "chunks"),
        (job(window=16, gradient=False), "chunks"),
        (job(window=64), "sdpa"),
        (job(window=16, dropout=0.1), "sdpa"),
        (job(window=16, mask=causal(torch.zeros(1, 64), past=3)), "sdpa"),
        (job(mask=everything()), "sdpa"),
        (job(softcap=2.0), "chunks"),
        (job(softcap=2.0, mask=everything()), "plain"),
        (job(softcap=2.0, dropout=0.1), "plain"),
        (job(softcap=2.0, mask=causal(torch.zeros(1, 1), past=3)), "plain"),
        (job(mask=causal(torch.zeros(2, 130), segments_BT=SEGMENTS)), "sdpa"),
        (job(mask=causal(torch.zeros(2, 130), segments_BT=SEGMENTS), dtype=torch.bfloat16), "chunks"),
    ],
)
def test_auto_takes_what_was_measured_to_be_fastest(work, name):
    assert choose(work).name == name


def test_dropout_drops_weights_and_keeps_their_mean():
    query, key, value = (heads(1, 1, 64, 8, seed, torch.float64).detach() for seed in range(3))
    mask = causal(torch.zeros(1, 64))
    for scores in (Scores(), Scores(softcap=3.0)):
        torch.manual_seed(0)
        exact = attend(query, key, value, mask, scores)
        draws = torch.stack([attend(query, key, value, mask, scores, dropout=0.3) for _ in range(2000)])
        # The mean of 2000 draws is within five of its standard deviations.
        assert ((draws.mean(0) - exact).abs() <= 5 * draws.std(0) / 2000**0.5 + 1e-12).all()
        assert draws.std(0).max() > 0.1


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        pytest.param(torch.float32, {"attention_softcap": 5.0}, marks=pytest.mark.slow),
        pytest.param(torch.float32, {"attention_windows": (16, None), "layers": 2}, marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_take_changing_lengths(dtype, options):
    torch.compiler.reset()
    options = {"layers": 1} | options
    model = decoder("nano", hidden_size=64, vocab_size=128, key_value_heads=2, **options).to(dtype)
    twin = copy.deepcopy(model)
    for block in twin.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    for length in (40, 130, 1):
        tokens = torch.randint(128, (2, length), generator=torch.Generator().manual_seed(length))
        wanted, got = model(tokens), twin(tokens)
        torch.testing.assert_close(got, wanted)
        got.sum().backward()


@pytest.mark.slow
def test_compiled_blocks_are_not_compiled_again_for_new_documents():
    torch.compiler.reset()
    model = decoder("nano", layers=2, hidden_size=64, vocab_size=128, attention_windows=(16, None))
    twin = copy.deepcopy(model)
    for block in twin.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    for step in range(3):
        tokens = torch.randint(128, (2, 64), generator=torch.Generator().manual_seed(step))
        segments = (torch.rand(2, 64, generator=torch.Generator().manual_seed(step)) < 0.1).cumsum(1)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            got = twin(tokens, segments_BT=segments)
            got.sum().backward()
        torch.testing.assert_close(got, model(tokens, segments_BT=segments))


@pytest.mark.parametrize("options", [{"attention_windows": (16,)}, {"attention_softcap": 2.0}])
def test_recomputed_blocks_give_the_same_gradients(options):
    model = decoder("nano", layers=2, hidden_size=64, vocab_size=128, **options)
    tokens = torch.randint(128, (2, 64), generator=torch.Generator().manual_seed(0))
    segments = (torch.rand(2, 64, generator=torch.Generator().manual_seed(1)) < 0.1).cumsum(1)
    gradients = []
    for recompute in (False, True):
        twin = copy.deepcopy(model)
        for block in twin.blocks if recompute else ():
            forward = block.forward
            block.forward = lambda *inputs, forward=forward: checkpoint(forward, *inputs, use_reentrant=False)
        twin(tokens, segments_BT=segments).square().sum().backward()
        gradients.append([parameter.grad for parameter in twin.parameters() if parameter.grad is not None])
    assert len(gradients[0]) > 10 and all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_bfloat16_step_is_as_close_to_float64_as_torch_attention(compiled, monkeypatch):
    torch.compiler.reset()
    model = decoder("nano", layers=2, hidden_size=64, vocab_size=128, key_value_heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    tokens = torch.randint(128, (2, 150), generator=torch.Generator().manual_seed(0))

    def gradient(dtype, compile_blocks=False):
        twin = copy.deepcopy(model).to(dtype)
        for block in twin.blocks if compile_blocks else ():
            block.compile(fullgraph=True, backend="aot_eager")
        logits = twin.head(twin(tokens))
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        return torch.cat([parameter.grad.double().flatten() for parameter in twin.parameters()])

    exact, ours = gradient(torch.float64), gradient(torch.bfloat16, compiled)
    monkeypatch.setattr("modalities_models.nn.attention_implementations.choose", lambda *_: SDPA)
    torchs = gradient(torch.bfloat16)
    assert not torch.equal(ours, torchs)
    assert (ours - exact).norm() < 1.5 * (torchs - exact).norm() + 1e-3 * exact.norm()
    assert (ours - exact).norm() < 0.1 * exact.norm()
