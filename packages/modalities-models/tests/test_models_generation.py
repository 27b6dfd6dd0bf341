"""Generation: caches against none, batches against single prompts, greedy text against transformers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modalities_core.errors import ConfigError, NumericalError
from modalities_models.decoder import decoder
from modalities_models.generation import NewToken, Sampling, generate, generate_batch
from modalities_models.nn.caches import KeyValueCache
from modalities_models.nn.mixture_of_experts import MixtureOfExperts

TINY = {"vocab_size": 37, "sequence_length": 12, "hidden_size": 32, "layers": 2, "heads": 4}
VARIANTS = {
    "rope": {"key_value_heads": 2, "query_key_norm": "head"},
    "windows": {"key_value_heads": 1, "attention_windows": (5, None)},
    "absolute": {"positions": "absolute", "norm": "layer", "activation": "gelu", "tied_embeddings": True},
    "none": {"positions": "none"},
    "experts": {"feedforward": MixtureOfExperts(experts=4, experts_per_token=2, intermediate_size=16)},
    "capped": {"attention_softcap": 5.0, "logit_softcap": 30.0, "attention_scale": 0.2, "norm_placement": "sandwich"},
}


def peaked(**arguments):
    """A model with large random weights, whose choices are far from ties."""
    model = decoder(**TINY | arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)
    return model


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


def gpt2_pair(transformers):
    """GPT-2 of transformers, and ours with the same weights."""
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
    return theirs, ours


def test_greedy_equals_hugging_face():
    theirs, ours = gpt2_pair(pytest.importorskip("transformers"))
    prompt = [5, 9, 2]
    wanted = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert list(generate(ours, prompt, 20, temperature=0)) == wanted[0, 3:].tolist()


def test_seed_decides():
    model = peaked()
    first = list(generate(model, [1], 10, temperature=3.0, seed=1))
    assert first == list(generate(model, [1], 10, temperature=3.0, seed=1))
    assert first != list(generate(model, [1], 10, temperature=3.0, seed=2))


PROMPTS = [[3, 1, 4, 1, 5, 9], [2], [6, 5, 3], [5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2]]


def texts(found, prompts):
    """Tokens and reason of each prompt."""
    tokens, reasons = [[] for _ in range(prompts)], [None] * prompts
    for new in found:
        assert reasons[new.prompt] is None, "nothing comes after the end"
        if new.token is not None:
            tokens[new.prompt].append(new.token)
        reasons[new.prompt] = new.finish
    assert None not in reasons
    return tokens, reasons


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=0.8, repetition_penalty=1.3)])
def test_a_batch_gives_what_each_prompt_alone_gives(variant, cache, sampling):
    # In float64, where the rounding of larger products cannot turn a choice.
    model = peaked(**VARIANTS[variant]).double()
    seeds = [7, 8, 9, 10]
    alone = [
        texts(generate_batch(model, [prompt], 20, sampling, [seed], cache=False), 1)[0][0]
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    # The longest outgrows the window of 12 at once, the shortest near the end: both ways of reading are mixed.
    assert texts(generate_batch(model, PROMPTS, 20, sampling, seeds, cache=cache), 4) == (alone, ["length"] * 4)


@pytest.mark.parametrize("variant", ["rope", "windows", "absolute"])
@pytest.mark.parametrize("cache", [True, False])
def test_texts_of_a_batch_end_one_by_one(cache, variant):
    model = peaked(**VARIANTS[variant] | {"sequence_length": 40, "seed": 3}).double()
    whole, _ = texts(generate_batch(model, PROMPTS, 20, Sampling(), cache=False), 4)
    ends = {whole[0][3], whole[1][9], whole[2][0]}

    def stop(prompt, token):
        return prompt == 3 and token == whole[3][5]

    places = [min([text.index(end) for end in ends if end in text], default=20) for text in whole]
    reasons = ["end" if place < 20 else "length" for place in places]
    stopped = whole[3].index(whole[3][5]) + 1
    if stopped <= places[3]:
        places[3], reasons[3] = stopped, "stop"
    wanted = [text[:place] for text, place in zip(whole, places, strict=True)]
    assert reasons[2] == "end" and not wanted[2]
    found = generate_batch(model, PROMPTS, 20, Sampling(), end_tokens=ends, stop=stop, cache=cache)
    assert texts(found, 4) == (wanted, reasons)


class Counting(nn.Module):
    """A Model as small as the Protocol allows, without caches: each token is followed by the next number."""

    vocab_size = 37
    sequence_length = 8

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.eye(37).roll(1, 1))
        self.head = nn.Identity()
        self.rows = []

    def forward(self, tokens_BT):
        self.rows.append(tokens_BT.shape)
        return self.table[tokens_BT]


def test_any_model_of_the_protocol_serves():
    model = Counting()
    found, _ = texts(generate_batch(model, [[3], [30, 31], [5] * 10], 9, Sampling(temperature=0)), 3)
    assert found == [[(start + n) % 37 for n in range(1, 10)] for start in (3, 31, 5)]
    assert max(width for _, width in model.rows) == 8


def test_a_model_with_caches_reads_each_token_once_and_drops_texts_that_have_ended(monkeypatch):
    model = peaked(sequence_length=64)
    read, forward = [], model.forward

    def noting(tokens_BT, *rest, **others):
        read.append(tuple(tokens_BT.shape))
        return forward(tokens_BT, *rest, **others)

    monkeypatch.setattr(model, "forward", noting)
    list(generate(model, [1, 2, 3], 10))
    assert read == [(1, 3)] + [(1, 1)] * 9
    read.clear()
    list(generate_batch(model, PROMPTS, 8, stop=lambda prompt, token: prompt > 1))
    # Two of four ended with their first token.
    assert read == [(4, 12)] + [(2, 1)] * 7
    read.clear()
    monkeypatch.delattr(KeyValueCache, "keep")
    list(generate_batch(model, PROMPTS, 8, stop=lambda prompt, token: prompt > 1))
    assert read == [(4, 12)] + [(4, 1)] * 7


def test_a_batch_equals_transformers_greedy_text():
    transformers = pytest.importorskip("transformers")
    theirs, ours = gpt2_pair(transformers)
    longest = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    seen = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    wanted = theirs.generate(
        padded, attention_mask=seen, max_new_tokens=15, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert texts(generate_batch(ours, PROMPTS, 15, Sampling(temperature=0)), 4)[0] == wanted[:, longest:].tolist()


def test_repetition_penalty_equals_transformers():
    transformers = pytest.importorskip("transformers")
    theirs, ours = gpt2_pair(transformers)
    prompt = PROMPTS[0]
    wanted = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, repetition_penalty=1.8, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    found = list(generate(ours, prompt, 20, temperature=0, repetition_penalty=1.8))
    assert found == wanted[0, len(prompt) :].tolist()
    assert found != list(generate(ours, prompt, 20, temperature=0))


def test_training_goes_on_after_generation():
    model = peaked(query_key_norm="head")
    list(generate(model, [1, 2], 4))
    tokens = torch.tensor([[1, 2, 3]])
    model.head(model(tokens)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


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
    assert list(generate_batch(model, [[1], [2]], 0)) == [NewToken(0, None, "length"), NewToken(1, None, "length")]
    assert list(generate_batch(model, [], 5)) == []


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
        ({"min_p": 2.0}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(arguments, message):
    with pytest.raises(ConfigError, match=message):
        generate(**{"model": decoder(**TINY), "tokens": [1], "max_new_tokens": 3} | arguments)


def test_a_prompt_that_is_wrong_is_named():
    with pytest.raises(ConfigError, match="prompt 2 has no token"):
        generate_batch(decoder(**TINY), [[1], []], 3)
    with pytest.raises(ConfigError, match="2 prompts and 1 seeds"):
        generate_batch(decoder(**TINY), [[1], [2]], 3, seeds=[1])


def test_damaged_weights_are_reported():
    model = decoder(**TINY)
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="not numbers"):
        list(generate(model, [1], 3))
