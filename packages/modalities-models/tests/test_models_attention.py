"""Attention against the definition in float64, with and without chunks."""

from __future__ import annotations

import copy

import pytest
import torch

from modalities_models.decoder import decoder
from modalities_models.nn.attention_implementations import Scores, attend
from modalities_models.nn.chunked_attention import LONGEST, chunk_bounds, chunked_causal_attention, suits
from modalities_models.nn.masks import causal


def heads(batch: int, count: int, length: int, size: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(batch, length, count, size, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).transpose(1, 2).requires_grad_()


def definition(query, key, value):
    """The formula of arXiv:1706.03762, section 3.2.1, with the future masked; key heads are repeated for groups."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    new, total = scores.shape[-2:]
    future = torch.arange(total) > torch.arange(total - new, total)[:, None]
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ value


def compare(attention, query, key, value, tolerance):
    exact = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    wanted, got = definition(*exact), attention(query, key, value)
    direction = torch.randn(got.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    wanted_gradients = torch.autograd.grad(wanted, exact, direction)
    gradients = torch.autograd.grad(got, [query, key, value], direction.to(got.dtype))
    for ours, theirs in zip((got, *gradients), (wanted, *wanted_gradients), strict=True):
        assert ours.dtype == query.dtype and ours.shape == theirs.shape
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("length", [2, 63, 64, 65, 200])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.bfloat16, 0.02)])
def test_chunked_attention_follows_the_definition(length, key_heads, dtype, tolerance):
    query = heads(2, 4, length, 16, 0, dtype)
    key, value = heads(2, key_heads, length, 16, 1, dtype), heads(2, key_heads, length, 16, 2, dtype)
    compare(chunked_causal_attention, query, key, value, tolerance)


@pytest.mark.parametrize(("new", "total"), [(1, 1), (1, 9), (4, 9), (9, 9)])
@pytest.mark.parametrize("key_heads", [1, 4])
def test_attention_of_the_last_tokens_follows_the_definition(new, total, key_heads):
    query = heads(2, 4, new, 8, 0, torch.float64)
    key, value = (heads(2, key_heads, total, 8, seed, torch.float64) for seed in (1, 2))
    mask = causal(query[:, 0, :, 0], total - new)
    compare(lambda *heads: attend(*heads, mask, Scores()), query, key, value, 1e-13)


@pytest.mark.parametrize("length", [1, 2, 64, 65, 256, 513, 1000, LONGEST])
def test_chunks_cover_the_sequence_once(length):
    bounds = chunk_bounds(length)
    assert [index for start, end in bounds for index in range(start, end)] == list(range(length))
    assert len(bounds) <= 8


def test_bfloat16_training_takes_chunks_and_nothing_else_does():
    query = heads(1, 2, 32, 8, 0, torch.bfloat16)
    assert suits(query, query, 0.0)
    assert not suits(query, query, 0.1)
    assert not suits(query.detach(), query, 0.0)
    assert not suits(query.float(), query, 0.0)
    assert not suits(query[:, :, :1], query, 0.0)
    long = heads(1, 1, LONGEST + 1, 2, 0, torch.bfloat16)
    assert not suits(long, long, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_blocks_take_changing_lengths(dtype):
    torch.compiler.reset()
    model = decoder("nano", layers=1, hidden_size=64, vocab_size=128, key_value_heads=2).to(dtype)
    twin = copy.deepcopy(model)
    for block in twin.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    for length in (40, 130, 1):
        tokens = torch.randint(128, (2, length), generator=torch.Generator().manual_seed(length))
        wanted, got = model(tokens), twin(tokens)
        torch.testing.assert_close(got, wanted)
        got.sum().backward()


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
    monkeypatch.setattr("modalities_models.nn.attention_implementations.suits", lambda *_: False)
    torchs = gradient(torch.bfloat16)
    assert not torch.equal(ours, torchs)
    assert (ours - exact).norm() < 1.5 * (torchs - exact).norm() + 1e-3 * exact.norm()
    assert (ours - exact).norm() < 0.1 * exact.norm()
