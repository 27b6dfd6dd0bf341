"""Documents packed into one sample are worth what they are worth alone."""

from __future__ import annotations

import pytest
import torch

from modalities_models.decoder import decoder
from modalities_models.nn.masks import causal, segment_positions

SIZES = {"vocab_size": 50, "sequence_length": 16, "hidden_size": 32, "layers": 2, "heads": 4}
SEGMENTS = torch.tensor([[0] * 5 + [1] + [2] * 7 + [3] * 3, [0] * 16])


@pytest.mark.parametrize("options", [{}, {"positions": "absolute"}, {"key_value_heads": 2}, {"positions": "none"}])
def test_packed_documents_equal_separate_ones(options: dict[str, object]) -> None:
    model = decoder(**SIZES, **options).double()
    tokens = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    packed = model(tokens, segments_BT=SEGMENTS)
    for row in range(2):
        for number in SEGMENTS[row].unique():
            places = (SEGMENTS[row] == number).nonzero().flatten()
            alone = model(tokens[row, places][None])[0]
            # RoPE's angles are float32 by design, so rows of another length may round differently.
            torch.testing.assert_close(packed[row, places], alone, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(packed[0, 6:], model(tokens)[0, 6:])


def test_positions_and_mask_by_hand() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 1, 2]])
    assert segment_positions(segments).tolist() == [[0, 1, 0, 1, 2, 0]]
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert causal(segments, segments_BT=segments).dense(None)[0, 0].int().tolist() == expected


def test_no_gradient_crosses_a_boundary() -> None:
    model = decoder(**SIZES, positions="absolute").double()
    tokens = torch.arange(16)[None] % 50
    hidden = model(tokens, segments_BT=SEGMENTS[:1])
    hidden[0, 6:13].sum().backward()
    seen = model.embedding.weight.grad.abs().sum(1) > 0
    assert seen[:16].nonzero().flatten().tolist() == list(range(6, 13))
