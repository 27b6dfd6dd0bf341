"""Reading a text in pieces, with caches, equals reading it at once, for every kind of attention; memory is bounded."""

from __future__ import annotations

import itertools

import pytest
import torch

from modalities_models.decoder import decoder
from modalities_models.nn.caches import KeyValueCache
from modalities_models.nn.rope_scaling import Yarn

SIZES = {"vocab_size": 50, "sequence_length": 40, "hidden_size": 32, "layers": 3, "heads": 4}
KINDS = {
    "plain": {},
    "grouped": {"key_value_heads": 2, "query_key_norm": "head"},
    "multi_query": {"key_value_heads": 1, "query_key_norm": "projection", "query_key_value_bias": True},
    "window": {"attention_windows": (5,)},
    "window_of_one": {"attention_windows": (1, None)},
    "pattern": {"attention_windows": (3, 8, None), "key_value_heads": 2, "attention_softcap": 3.0},
    "scale_and_cap": {"attention_scale": 0.6, "attention_softcap": 2.0, "bias": True, "norm": "layer"},
    "absolute": {"positions": "absolute", "attention_windows": (6, None)},
    "none": {"positions": "none", "dropout": 0.3},
    "yarn": {"rope_scaling": Yarn(4.0, 10), "attention_windows": (None, 7)},
}


def model_of(kind: str):
    """A model in evaluation mode with weights so large that a wrong mask shows."""
    model = decoder(**SIZES | KINDS[kind]).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return model


def text(rows: int, length: int) -> torch.Tensor:
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [(40,), (1,) * 40, (11, 1, 1, 4, 1, 20, 2), (3, 30, 7)])
@torch.no_grad()
def test_pieces_with_caches_equal_the_whole(kind, pieces):
    model, tokens = model_of(kind), text(2, 40)
    caches = model.new_caches()
    read = torch.cat([model(piece, caches) for piece in tokens.split(pieces, 1)], 1)
    torch.testing.assert_close(read, model(tokens), rtol=1e-10, atol=1e-10)
    assert all(cache.length == 40 for cache in caches)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [(20,), (9, 1, 1, 1, 8), (1,) * 20])
@torch.no_grad()
def test_padded_prompts_read_together_equal_those_read_alone(kind, pieces):
    model, padding = model_of(kind), torch.tensor([0, 7, 19, 3])
    tokens = text(4, 20)
    caches = model.new_caches(20)
    together = torch.cat([model(piece, caches, padding_B=padding) for piece in tokens.split(pieces, 1)], 1)
    assert together.isfinite().all()
    for row, skipped in enumerate(padding.tolist()):
        alone = model(tokens[row : row + 1, skipped:])[0]
        # Angles are float32, and a shorter row may round its cosines differently.
        torch.testing.assert_close(together[row, skipped:], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_padding_changes_nothing(kind):
    model, padding = model_of(kind).eval(), torch.tensor([4, 0])
    tokens = text(2, 12)
    other = tokens.clone()
    other[0, :4] = (other[0, :4] + 17) % 50
    first, second = model(tokens, padding_B=padding), model(other, padding_B=padding)
    assert torch.equal(first[0, 4:], second[0, 4:]) and torch.equal(first[1], second[1])
    gradient = torch.autograd.grad(first[0, 4:].square().sum(), model.embedding.weight)[0]
    assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", ["window", "window_of_one", "pattern"])
@torch.no_grad()
def test_a_token_out_of_all_windows_is_not_seen(kind):
    """Through L blocks of window w a token reaches L * (w - 1) places further."""
    windows = {"window": (5,), "window_of_one": (1,), "pattern": (3,)}[kind]
    model = decoder(**SIZES | {"attention_windows": windows}).double()
    tokens = text(1, 40)
    other = tokens.clone()
    other[0, 2] = (other[0, 2] + 1) % 50
    changed = (model(tokens) != model(other)).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == list(range(2, 2 + 3 * (windows[0] - 1) + 1))


@pytest.mark.parametrize("window", [1, 2, 5, 8, 100])
@pytest.mark.parametrize("pieces", [[1] * 30, [7, 1, 1, 1, 12, 3, 5], [30], [4] * 7 + [2]])
def test_a_windowed_cache_gives_what_is_still_seen(window, pieces):
    cache = KeyValueCache(30, window)
    everything = torch.arange(30.0).view(1, 1, 30, 1)
    read = 0
    for new in pieces:
        piece = everything[:, :, read : read + new]
        keys, values = cache.append(piece, -piece)
        first = read - min(read, window - 1)
        assert torch.equal(keys, everything[:, :, first : read + new]) and torch.equal(values, -keys)
        read += new
    assert cache.length == 30


def test_memory_of_a_windowed_cache_does_not_grow_with_the_text():
    cache = KeyValueCache(100_000, 16)
    for _ in range(2000):
        keys, _ = cache.append(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4))
    assert cache.length == 6000
    assert keys.untyped_storage().nbytes() <= 2 * 16 * 4 * 4
    whole = KeyValueCache(100_000)
    keys, _ = whole.append(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4))
    assert keys.untyped_storage().nbytes() == 100_000 * 4 * 4


def test_caches_follow_the_pattern_of_windows():
    model = decoder(**SIZES | {"attention_windows": (4, None), "layers": 5})
    assert [cache.window for cache in model.new_caches()] == [4, None, 4, None, 4]


@pytest.mark.parametrize("norm", ["head", "projection"])
def test_queries_and_keys_are_normed_by_head_or_as_a_whole(norm):
    """What reaches the scores has a mean square of 1 over a head, or over all heads of a token."""
    model = decoder(**SIZES | {"key_value_heads": 2, "query_key_norm": norm, "positions": "none"}).double()
    attention = model.blocks[0].attention
    assert attention.query_norm.weight.shape == ((8,) if norm == "head" else (32,))
    assert attention.key_norm.weight.shape == ((8,) if norm == "head" else (16,))
    hidden = torch.randn(2, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for projection, scale in ((attention.query, attention.query_norm), (attention.key, attention.key_norm)):
        heads = attention._heads(projection(hidden), scale)
        over = (-1,) if norm == "head" else (-2, -1)
        torch.testing.assert_close(
            heads.square().mean(over), torch.ones(heads.shape[: 4 - len(over)], dtype=torch.float64), rtol=2e-2, atol=0
        )


def test_biases_stand_where_they_were_asked_for():
    for bias, inputs in itertools.product((False, True), (None, False, True)):
        attention = decoder(**SIZES | {"bias": bias, "query_key_value_bias": inputs}).blocks[0].attention
        wanted = bias if inputs is None else inputs
        assert [getattr(attention, name).bias is not None for name in ("query", "key", "value")] == [wanted] * 3
        assert (attention.output.bias is not None) == bias
