"""Attention of one token after a cache, the step of generation, against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from modalities_models.nn.attention_implementations import attend
from modalities_models.nn.attention_jobs import Scores
from modalities_models.nn.masks import causal

PAST, HEADS, SIZE = 8, 4, 8
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def heads(count: int, length: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(2, length, count, SIZE, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).transpose(1, 2).requires_grad_()


def definition(query, key, value, seen, scale):
    """Head by head, each on the keys of its group."""
    shared = HEADS // key.shape[1]
    found = torch.empty_like(query)
    for row in range(2):
        for head in range(HEADS):
            keys, values = key[row, head // shared][seen[row]], value[row, head // shared][seen[row]]
            found[row, head, 0] = (keys @ query[row, head, 0] * scale).softmax(0) @ values
    return found


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("padding", [None, [0, 6]])
def test_one_token_sees_what_the_cache_keeps(dtype, key_heads, window, padding):
    kept = PAST if window is None else window - 1
    query = heads(HEADS, 1, 0, dtype)
    key, value = (heads(key_heads, kept + 1, seed, dtype) for seed in (1, 2))
    seen = torch.ones(2, kept + 1, dtype=torch.bool)
    for row, count in enumerate(padding or []):
        seen[row, : max(0, count - (PAST - kept))] = False
    padding_B = None if padding is None else torch.tensor(padding)
    mask = causal(torch.zeros(2, 1), PAST, padding_B=padding_B)
    exact = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    wanted, got = definition(*exact, seen, 0.3), attend(query, key, value, mask, Scores(window, scale=0.3))
    tolerance = TOLERANCES[dtype]
    direction = torch.randn(got.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    gradients = torch.autograd.grad(got, [query, key, value], direction.to(dtype))
    for ours, theirs in zip((got, *gradients), (wanted, *torch.autograd.grad(wanted, exact, direction)), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
