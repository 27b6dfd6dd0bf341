"""GPT-2 and StarCoder2: LayerNorm, biases, and a feed-forward of two matrices."""

from __future__ import annotations

from typing import Any

from modalities_models.architecture import Architecture
from modalities_models.huggingface.common import ACTS, ATTENTION, OUTER, PLAIN_BY, PRE_NORM, widest, write_common
from modalities_models.huggingface.family import Family, Names, Shapes, renamed
from modalities_models.huggingface.links import Joined, Link, Transposed
from modalities_models.huggingface.rope import read_rope
from modalities_models.huggingface.settings import Settings
from modalities_models.parts import Activation

GPT2_NAMES = Names(
    outer={
        "embedding": "transformer.wte",
        "positions": "transformer.wpe",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    },
    inner={
        "attention_norm": "ln_1",
        "feedforward_norm": "ln_2",
        "attention.output": "attn.c_proj",
        "feedforward.up": "mlp.c_fc",
        "feedforward.down": "mlp.c_proj",
    },
    block="transformer.h.{}.",
    matrix=Transposed,
)
STARCODER2_NAMES = Names(OUTER, ATTENTION | PRE_NORM | {"feedforward.up": "mlp.c_fc", "feedforward.down": "mlp.c_proj"})


def _dropout(settings: Settings, keys: tuple[str, ...], default: float) -> float:
    """One probability where the three agree; ours has one for all three places."""
    values = [settings.take(key, float, default) for key in keys]
    if len(set(values)) == 1:
        return values[0]
    for key in keys:
        settings.training_only(key)
    return 0.0


def _activation(settings: Settings, key: str, default: str) -> Activation:
    name = settings.take(key, str, default)
    if name not in PLAIN_BY:
        raise settings.refusal(key, f"Modalities has {', '.join(PLAIN_BY)} here")
    return PLAIN_BY[name]


def _read_gpt2(settings: Settings) -> Architecture:
    take = settings.take
    settings.require("scale_attn_weights", True, True)
    settings.require("scale_attn_by_inverse_layer_idx", False, False)
    settings.require("add_cross_attention", False, False)
    heads, hidden_size = take("n_head", int), take("n_embd", int)
    return Architecture(
        vocab_size=take("vocab_size", int),
        sequence_length=take("n_positions", int),
        hidden_size=hidden_size,
        layers=take("n_layer", int),
        heads=heads,
        key_value_heads=heads,
        head_size=hidden_size // max(heads, 1),
        intermediate_size=take("n_inner", int, 4 * hidden_size),
        norm="layer",
        norm_eps=take("layer_norm_epsilon", float, 1e-5),
        activation=_activation(settings, "activation_function", "gelu_new"),
        positions="absolute",
        bias=True,
        tied_embeddings=take("tie_word_embeddings", bool, True),
        dropout=_dropout(settings, ("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1),
    )


def _write_gpt2(a: Architecture) -> dict[str, Any]:
    return {
        "vocab_size": a.vocab_size,
        "n_positions": a.sequence_length,
        "n_embd": a.hidden_size,
        "n_layer": a.layers,
        "n_head": a.heads,
        "n_inner": a.intermediate_size,
        "layer_norm_epsilon": a.norm_eps,
        "activation_function": "gelu_new" if a.activation == "gelu" else ACTS[a.activation],
        "resid_pdrop": a.dropout,
        "embd_pdrop": a.dropout,
        "attn_pdrop": a.dropout,
        "tie_word_embeddings": a.tied_embeddings,
    }


def _gpt2_links(a: Architecture, shapes: Shapes) -> list[Link]:
    fused: list[Link] = []
    for layer in range(a.layers):
        for leaf in ("weight", "bias"):
            ours = tuple(f"blocks.{layer}.attention.{part}.{leaf}" for part in ("query", "key", "value"))
            their = f"transformer.h.{layer}.attn.c_attn.{leaf}"
            fused.append(Joined(ours, their, (a.hidden_size,) * 3, transposed=leaf == "weight"))
    return renamed(a, shapes, GPT2_NAMES, fused)


def _read_starcoder2(settings: Settings) -> Architecture:
    take = settings.take
    settings.require("use_bias", True, True)
    settings.require("norm_type", "layer_norm", "layer_norm")
    settings.require("mlp_type", "default", "default")
    heads, hidden_size = take("num_attention_heads", int), take("hidden_size", int)
    length = take("max_position_embeddings", int)
    return Architecture(
        vocab_size=take("vocab_size", int),
        sequence_length=length,
        hidden_size=hidden_size,
        layers=take("num_hidden_layers", int),
        heads=heads,
        key_value_heads=take("num_key_value_heads", int, 2),
        head_size=take("head_dim", int, hidden_size // max(heads, 1)),
        intermediate_size=take("intermediate_size", int),
        norm="layer",
        norm_eps=take("norm_epsilon", float, 1e-5),
        activation=_activation(settings, "hidden_act", "gelu_pytorch_tanh"),
        bias=True,
        attention_windows=(take("sliding_window", int, None),),
        tied_embeddings=take("tie_word_embeddings", bool, True),
        dropout=_dropout(settings, ("residual_dropout", "embedding_dropout", "attention_dropout"), 0.0),
        **read_rope(settings, 10_000.0, length),
    )


def _write_starcoder2(a: Architecture) -> dict[str, Any]:
    settings = write_common(a) | {
        "norm_epsilon": a.norm_eps,
        "use_bias": a.bias,
        "sliding_window": widest(a),
        "residual_dropout": a.dropout,
        "embedding_dropout": a.dropout,
        "attention_dropout": a.dropout,
    }
    del settings["rms_norm_eps"]
    return settings


def _starcoder2_links(a: Architecture, shapes: Shapes) -> list[Link]:
    return renamed(a, shapes, STARCODER2_NAMES)


GPT2 = Family("gpt2", "GPT2LMHeadModel", _read_gpt2, _write_gpt2, _gpt2_links, prefix="transformer.")
STARCODER2 = Family("starcoder2", "Starcoder2ForCausalLM", _read_starcoder2, _write_starcoder2, _starcoder2_links)
