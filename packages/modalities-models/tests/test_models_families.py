"""Norm placements, activations, biases, multipliers and soft caps against Hugging Face's models that have them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modalities_models.decoder import decoder

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80}
OURS = SIZES | {"sequence_length": 24, "layers": 3, "heads": 6, "key_value_heads": 2}
THEIRS = SIZES | {
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
    "attn_implementation": "eager",
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
PARTS = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "o_proj",
    "query_norm": "q_norm",
    "key_norm": "k_norm",
    "attention": "self_attn",
    "feedforward": "mlp",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
    "blocks": "model.layers",
    "attention_norm": "input_layernorm",
}
PRE = PARTS | {"feedforward_norm": "post_attention_layernorm"}
POST = PARTS | {
    "attention_output_norm": "post_attention_layernorm",
    "feedforward_output_norm": "post_feedforward_layernorm",
}
SANDWICH = POST | {"feedforward_norm": "pre_feedforward_layernorm"}


def olmo2():
    config = transformers.Olmo2Config(**THEIRS, rms_norm_eps=1e-6, tie_word_embeddings=False)
    ours = decoder(**OURS, norm_eps=1e-6, norm_placement="post", query_key_norm="projection")
    return transformers.Olmo2ForCausalLM(config), ours, POST


def gemma2():
    config = transformers.Gemma2Config(
        **THEIRS,
        head_dim=8,
        query_pre_attn_scalar=12,
        sliding_window=7,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=2.0,
    )
    ours = decoder(
        **OURS,
        norm_eps=1e-6,
        norm_placement="sandwich",
        activation="geglu",
        attention_windows=(7, None),
        attention_scale=12**-0.5,
        attention_softcap=3.0,
        logit_softcap=2.0,
        embedding_multiplier=torch.tensor(48**0.5).item(),  # they keep it in float32
        tied_embeddings=True,
    )
    return transformers.Gemma2ForCausalLM(config), ours, SANDWICH


def granite():
    config = transformers.GraniteConfig(
        **THEIRS,
        rms_norm_eps=1e-6,
        embedding_multiplier=3.0,
        residual_multiplier=0.3,
        logits_scaling=5.0,
        attention_multiplier=0.2,
        tie_word_embeddings=False,
    )
    ours = decoder(
        **OURS,
        norm_eps=1e-6,
        embedding_multiplier=3.0,
        residual_multiplier=0.3,
        logit_multiplier=0.2,
        attention_scale=0.2,
        vocab_multiple=32,
    )
    return transformers.GraniteForCausalLM(config), ours, PRE


def qwen2():
    config = transformers.Qwen2Config(**THEIRS, rms_norm_eps=1e-6, tie_word_embeddings=True)
    ours = decoder(**OURS, norm_eps=1e-6, query_key_value_bias=True, tied_embeddings=True, vocab_multiple=64)
    return transformers.Qwen2ForCausalLM(config), ours, PRE


def arcee():
    config = transformers.ArceeConfig(**THEIRS, tie_word_embeddings=False)
    return transformers.ArceeForCausalLM(config), decoder(**OURS, activation="relu_squared"), PRE


FAMILIES = {family.__name__: family for family in (olmo2, gemma2, granite, qwen2, arcee)}


def widen(theirs: nn.Module) -> None:
    """Let norms, which Hugging Face computes in float32, be float64 where the weights are."""
    for module in theirs.modules():
        if type(module).__name__.endswith("RMSNorm"):
            scale = 1.0 + module.weight if "Gemma" in type(module).__name__ else module.weight
            module.forward = lambda x, m=module, s=scale: torch.nn.functional.rms_norm(
                x, m.weight.shape, s, getattr(m, "variance_epsilon", None) or m.eps
            )


def copied(ours: nn.Module, theirs: nn.Module, parts: dict[str, str]) -> dict[str, str]:
    """Copy their weights into ours; gives the names of both."""
    generator = torch.Generator().manual_seed(1)
    pairs = {name: ".".join(parts.get(part, part) for part in name.split(".")) for name, _ in ours.named_parameters()}
    tensors = dict(theirs.named_parameters())
    assert set(pairs.values()) == set(tensors)
    gemma = type(theirs).__name__.startswith("Gemma")
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            other = tensors[pairs[name]]
            other.add_(torch.randn(other.shape, generator=generator) * 0.1)
            # Whatever stands in the rows of padding, it has no effect.
            parameter.fill_(1e3)[: other.shape[0]] = other + 1.0 if gemma and "norm" in name else other
    return pairs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_logits_and_gradients_equal_hugging_face(family, dtype, tolerance, monkeypatch):
    # Their attention takes the softmax in float32 whatever the weights are.
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=-1, dtype=None: softmax(x, dim))
    torch.manual_seed(0)
    theirs, ours, parts = FAMILIES[family]()
    theirs, ours = theirs.to(dtype).train(), ours.to(dtype).train()
    pairs = copied(ours, theirs, parts)
    if dtype == torch.float64:
        widen(theirs)
    tokens = torch.randint(97, (2, 24))
    wanted = theirs(tokens, use_cache=False).logits
    got = ours.head(ours(tokens))
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    direction = torch.randn(got.shape, dtype=dtype) / got.numel() ** 0.5
    (wanted * direction).sum().backward()
    (got * direction).sum().backward()
    tensors = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = tensors[pairs[name]].grad
        assert gradient.abs().max() > 0, name
        assert not parameter.grad[gradient.shape[0] :].any(), "padding takes no gradient"
        torch.testing.assert_close(
            parameter.grad[: gradient.shape[0]], gradient, rtol=10 * tolerance, atol=10 * tolerance, msg=name
        )
