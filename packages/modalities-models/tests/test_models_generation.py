"""Generation: filters against brute force, caches against none, sampling against the distribution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modalities_core.errors import ConfigError, NumericalError
from modalities_models.decoder import decoder
from modalities_models.generation import choose, generate, keep_top_k, keep_top_p

TINY = {"vocab_size": 37, "sequence_length": 12, "hidden_size": 32, "layers": 2, "heads": 4}
VARIANTS = {
    "rope": {"key_value_heads": 2, "query_key_norm": "head"},
    "absolute": {"positions": "absolute", "norm": "layer", "activation": "gelu", "tied_embeddings": True},
    "none": {"positions": "none"},
}
LOGITS = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=12).map(torch.tensor)


def peaked(**arguments):
    """A model with large random weights, whose choices are far from ties."""
    model = decoder(**TINY | arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)
    return model


@settings(deadline=None)
@given(LOGITS, st.integers(1, 15))
def test_top_k_keeps_what_fewer_than_k_beat(logits, k):
    kept = keep_top_k(logits, k).isfinite().tolist()
    values = logits.tolist()
    assert kept == [sum(other > value for other in values) < k for value in values]


@settings(deadline=None)
@given(LOGITS, st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_sufficient_set(logits, p):
    logits = logits.double()
    kept = keep_top_p(logits, p).isfinite()
    probabilities = logits.softmax(-1)
    assert kept.any()
    assert probabilities[kept].sum() >= min(p, 1.0) - 1e-9
    # Leaving out the least likely kept one would not be enough, and nothing left out is likelier than it.
    least = probabilities[kept].min()
    if kept.sum() > 1 and p < 1.0:
        assert probabilities[kept].sum() - least < p + 1e-9
    if not kept.all():
        assert probabilities[~kept].max() <= least


@settings(deadline=None)
@given(LOGITS)
def test_filters_that_keep_all_change_nothing(logits):
    assert torch.equal(keep_top_k(logits, logits.numel()), logits)
    assert torch.equal(keep_top_p(logits, 1.0), logits)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prompt", [1, 5, 12, 20])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_generation_equals_the_uncached_one_token_for_token(variant, prompt, temperature):
    model = peaked(**VARIANTS[variant])
    tokens = torch.randint(37, (prompt,), generator=torch.Generator().manual_seed(prompt)).tolist()
    cached = list(generate(model, tokens, 24, temperature=temperature, seed=2))
    uncached = list(generate(model, tokens, 24, temperature=temperature, seed=2, cache=False))
    assert cached == uncached and len(cached) == 24


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_with_a_cache_equal_those_without(variant):
    model = peaked(**VARIANTS[variant]).double()
    tokens = torch.randint(37, (2, 12), generator=torch.Generator().manual_seed(0))
    caches = model.new_caches()
    pieces = [model(part, caches) for part in tokens.split([4, 1, 3, 4], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=1e-9, atol=1e-9)
    with pytest.raises(ConfigError, match="at most 12 tokens, not 13"):
        model(tokens[:, :1], caches)


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_is_the_most_likely_token_of_the_last_window(variant):
    model = peaked(**VARIANTS[variant])
    text = [3, 1, 4]
    for token in generate(model, [3, 1, 4], 20, temperature=0):
        window = torch.tensor([text[-12:]])
        assert token == model.head(model(window))[0, -1].argmax().item()
        text.append(token)
    assert len(text) == 23


def test_greedy_equals_hugging_face():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=37, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.5)
    ).eval()
    ours = decoder("gpt2", **TINY | {"sequence_length": 32})
    source = theirs.transformer
    with torch.no_grad():
        ours.embedding.weight.copy_(source.wte.weight)
        ours.positions.weight.copy_(source.wpe.weight)
        for block, layer in zip(ours.blocks, source.h, strict=True):
            query_key_value = layer.attn.c_attn.weight.chunk(3, dim=-1)
            for name, weight in zip(("query", "key", "value"), query_key_value, strict=True):
                getattr(block.attention, name).weight.copy_(weight.T)
            block.attention.output.weight.copy_(layer.attn.c_proj.weight.T)
            block.feedforward.up.weight.copy_(layer.mlp.c_fc.weight.T)
            block.feedforward.down.weight.copy_(layer.mlp.c_proj.weight.T)
    prompt = [5, 9, 2]
    wanted = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert list(generate(ours, prompt, 20, temperature=0)) == wanted[0, 3:].tolist()


def test_sampling_follows_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(
        torch.tensor([choose(logits, 0.7, None, None, generator) for _ in range(4000)]), minlength=4
    )
    wanted = (logits / 0.7).softmax(-1)
    # Four standard deviations of a binomial share.
    assert ((counts / 4000 - wanted).abs() < 4 * (wanted * (1 - wanted) / 4000).sqrt()).all()


@settings(max_examples=30, deadline=None)
@given(LOGITS, st.integers(1, 12), st.floats(0.05, 1.0))
def test_sampled_tokens_pass_both_filters(logits, k, p):
    generator = torch.Generator().manual_seed(0)
    allowed = keep_top_p(keep_top_k(logits, k), p).isfinite()
    assert all(allowed[choose(logits, 1.0, k, p, generator)] for _ in range(10))


def test_a_tiny_temperature_is_greedy():
    logits = torch.tensor([1.0, 1.5, 1.4])
    generator = torch.Generator().manual_seed(0)
    assert {choose(logits, 1e-30, None, None, generator) for _ in range(20)} == {1}


def test_seed_decides():
    model = peaked()
    first = list(generate(model, [1], 10, temperature=3.0, seed=1))
    assert first == list(generate(model, [1], 10, temperature=3.0, seed=1))
    assert first != list(generate(model, [1], 10, temperature=3.0, seed=2))


def test_ends_before_the_end_of_document_and_leaves_the_model_as_it_was():
    model = peaked(dropout=0.3).train()
    text = list(generate(model, [1, 2], 10, temperature=0))
    stop = text[4]
    assert list(generate(model, [1, 2], 10, temperature=0, end_of_document=stop)) == text[: text.index(stop)]
    assert model.training
    stream = generate(model, [1, 2], 10, temperature=0)
    assert next(stream) == text[0]
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    stream.close()
    assert model.training
    assert list(generate(model, [1, 2], 0)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": []}, "no token"),
        ({"tokens": [37]}, "token 37"),
        ({"tokens": [-1]}, "token -1"),
        ({"max_new_tokens": -1}, "negative"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(arguments, message):
    with pytest.raises(ConfigError, match=message):
        generate(**{"model": decoder(**TINY), "tokens": [1], "max_new_tokens": 3} | arguments)


def test_damaged_weights_are_reported():
    model = decoder(**TINY)
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="not numbers"):
        list(generate(model, [1], 3))
