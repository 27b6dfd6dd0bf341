"""The decoder against Hugging Face's: same weights, same logits, same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modalities_models.decoder import Decoder, decoder

transformers = pytest.importorskip("transformers")

VOCAB, LENGTH, HIDDEN, LAYERS, HEADS, INNER = 97, 24, 48, 3, 6, 80
COMMON = {"vocab_size": VOCAB, "hidden_size": HIDDEN}
TINY = COMMON | {"sequence_length": LENGTH, "layers": LAYERS, "heads": HEADS, "intermediate_size": INNER}

NAMES = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "feedforward_norm": "post_attention_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "feedforward.gate": "mlp.gate_proj",
    "feedforward.up": "mlp.up_proj",
    "feedforward.down": "mlp.down_proj",
}
GPT2_NAMES = {
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "norm": "transformer.ln_f",
    "attention_norm": "ln_1",
    "feedforward_norm": "ln_2",
    "attention.output": "attn.c_proj",
    "feedforward.up": "mlp.c_fc",
    "feedforward.down": "mlp.c_proj",
}


def llama_like(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Our parameter ``name`` out of a Llama or Qwen model's tensors: a renaming."""
    owner, _, leaf = name.rpartition(".")
    if owner.startswith("blocks."):
        _, layer, part = owner.split(".", 2)
        return tensors[f"model.layers.{layer}.{NAMES[part]}.{leaf}"]
    return tensors[f"{NAMES[owner]}.{leaf}"]


def gpt2_like(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Our parameter ``name`` out of GPT-2's tensors, which hold matrices as (in, out) and q, k, v side by side."""
    owner, _, leaf = name.rpartition(".")
    if not owner.startswith("blocks."):
        return tensors[f"{GPT2_NAMES[owner]}.{leaf}"]
    _, layer, part = owner.split(".", 2)
    prefix = f"transformer.h.{layer}"
    third = {"attention.query": 0, "attention.key": 1, "attention.value": 2}.get(part)
    if third is not None:
        tensor = tensors[f"{prefix}.attn.c_attn.{leaf}"].chunk(3, dim=-1)[third]
    else:
        tensor = tensors[f"{prefix}.{GPT2_NAMES[part]}.{leaf}"]
    return tensor.mT if tensor.dim() == 2 else tensor


class WideRMSNorm(nn.Module):
    """The formula of arXiv:1910.07467 in the input's precision; Hugging Face's always goes down to float32."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x * x).mean(-1, keepdim=True).add(self.eps).sqrt() * self.weight


def widen_norms(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, WideRMSNorm(child.weight, child.variance_epsilon))


def llama(tied: bool, key_value_heads: int, bias: bool):
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **COMMON,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=key_value_heads,
            max_position_embeddings=LENGTH,
            rope_theta=5000.0,
            rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
            attention_bias=bias,
            mlp_bias=bias,
            attn_implementation="sdpa",
        )
    )
    ours = decoder(**TINY, key_value_heads=key_value_heads, rope_theta=5000.0, tied_embeddings=tied, bias=bias)
    return theirs, ours, llama_like


def qwen3():
    theirs = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **COMMON,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=LENGTH,
            rope_theta=1e6,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
    )
    ours = decoder(
        **TINY,
        key_value_heads=2,
        head_size=16,
        rope_theta=1e6,
        norm_eps=1e-6,
        query_key_norm="head",
        tied_embeddings=True,
    )
    return theirs, ours, llama_like


def gpt2():
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB,
            n_positions=LENGTH,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            n_inner=INNER,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="sdpa",
        )
    )
    ours = decoder("gpt2", **TINY)
    return theirs, ours, gpt2_like


MODELS = {
    "llama": lambda: llama(tied=False, key_value_heads=HEADS, bias=False),
    "llama-grouped-tied": lambda: llama(tied=True, key_value_heads=2, bias=False),
    "llama-bias": lambda: llama(tied=False, key_value_heads=3, bias=True),
    "qwen3": qwen3,
    "gpt2": gpt2,
}


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Norms and biases away from one and zero, so that leaving one out shows."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_logits_and_gradients_equal_hugging_face(kind, dtype, tolerance):
    torch.manual_seed(0)
    theirs, ours, translate = MODELS[kind]()
    randomise(theirs)
    theirs, ours = theirs.to(dtype).train(), ours.to(dtype).train()
    if dtype == torch.float64:
        widen_norms(theirs)
    their_tensors = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(translate(name, their_tensors))
    tokens = torch.randint(VOCAB, (2, LENGTH))
    their_logits = theirs(tokens, use_cache=False).logits
    our_logits = ours.head(ours(tokens))
    torch.testing.assert_close(our_logits, their_logits, rtol=tolerance, atol=tolerance)

    direction = torch.randn(our_logits.shape, dtype=dtype) / our_logits.numel() ** 0.5
    (their_logits * direction).sum().backward()
    (our_logits * direction).sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(
            parameter.grad, translate(name, gradients), rtol=10 * tolerance, atol=10 * tolerance, msg=name
        )


@pytest.mark.parametrize("kind", MODELS)
def test_no_parameter_of_hugging_face_is_left_out(kind):
    theirs, ours, _ = MODELS[kind]()
    assert ours.parameter_count == sum(parameter.numel() for parameter in theirs.parameters())
    assert isinstance(ours, Decoder) and ours.parameter_count == sum(p.numel() for p in ours.parameters())
