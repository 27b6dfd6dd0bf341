"""Masks against the words of their contract."""

from __future__ import annotations

import itertools

import pytest
import torch

from modalities_models.nn.masks import Mask, causal, everything


def seen_by_loops(new, past, window, segments, padding, batch):
    """(B, 1, T, S) booleans from the words of the contract, one pair of tokens after another."""
    seen = torch.zeros(batch, 1, new, past + new, dtype=torch.bool)
    for row, query, key in itertools.product(range(batch), range(new), range(past + new)):
        place = past + query
        sees = key <= place and (window is None or place - key < window)
        if segments is not None:
            sees = sees and segments[row, query] == segments[row, key]
        if padding is not None:
            sees = sees and (key >= padding[row] or key == place)
        seen[row, 0, query, key] = bool(sees)
    return seen


@pytest.mark.parametrize("past", [0, 1, 3, 6])
@pytest.mark.parametrize("new", [1, 2, 5])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 7, 20])
@pytest.mark.parametrize("padding", [None, torch.tensor([0, 2])])
def test_masks_are_what_the_contract_says(past, new, window, padding):
    mask = causal(torch.zeros(2, new), past, padding_B=padding)
    wanted = seen_by_loops(new, past, window, None, padding, 2)
    got = mask.dense(window)
    # A cache with a window gives only the keys some new token can see.
    wanted = wanted[..., past + new - got.shape[-1] :]
    assert torch.equal(got.expand(wanted.shape), wanted)
    kept = past if window is None else min(past, window - 1)
    assert got.shape[-1] == (past + new if window is None or window >= past + new else kept + new)
    assert torch.equal(mask.hidden(window).expand(2, new, -1), ~wanted[:, 0])
    if mask.hides_nothing(window):
        assert wanted.all()
    if mask.plain_causal(window):
        assert torch.equal(wanted, torch.ones(2, 1, new, new, dtype=torch.bool).tril())


def test_documents_are_masked_as_by_loops():
    segments = torch.tensor([[3, 3, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]])
    for window in (None, 2):
        wanted = seen_by_loops(6, 0, window, segments, None, 2)
        assert torch.equal(causal(segments, segments_BT=segments).dense(window), wanted)


def test_a_mask_is_made_once():
    mask = Mask("causal", 8, 0, torch.device("cpu"), padding_B=torch.tensor([1]))
    assert mask.dense(3) is mask.dense(3) and mask.dense(8) is mask.dense(None)
    assert mask.hidden(3) is mask.hidden(3) and torch.equal(mask.hidden(3), ~mask.dense(3)[:, 0])


def test_where_all_see_all_nothing_is_masked():
    assert everything().hides_nothing(None) and everything().hides_nothing(3)
    assert not everything().plain_causal(None)
