"""What most families say in the same words: sizes, activations, windows, and the names of Llama's modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modalities_models.architecture import Architecture
from modalities_models.huggingface.family import layer_pattern
from modalities_models.huggingface.rope import read_rope, write_rope
from modalities_models.huggingface.settings import Settings
from modalities_models.parts import Activation

GATED_BY: Mapping[str, Activation] = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_pytorch_tanh": "geglu",
    "gelu_new": "geglu",
}
PLAIN_BY: Mapping[str, Activation] = {"gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "relu2": "relu_squared"}
ACTS = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh", "gelu": "gelu_pytorch_tanh", "relu_squared": "relu2"}
"""Our activations in the names of transformers; two mean the same GELU in its tanh form."""

OUTER = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
ATTENTION = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
}
FEEDFORWARD = {
    "feedforward.gate": "mlp.gate_proj",
    "feedforward.up": "mlp.up_proj",
    "feedforward.down": "mlp.down_proj",
}
PRE_NORM = {"attention_norm": "input_layernorm", "feedforward_norm": "post_attention_layernorm"}
POST_NORM = {
    "attention_output_norm": "post_attention_layernorm",
    "feedforward_output_norm": "post_feedforward_layernorm",
}


def read_common(
    settings: Settings,
    *,
    eps: float = 1e-6,
    tied: bool = False,
    key_value_heads: int | None = None,
    head_size: int | None = None,
    theta: float = 10_000.0,
    acts: Mapping[str, Activation] = GATED_BY,
    act_key: str = "hidden_act",
    act: str = "silu",
) -> dict[str, Any]:
    """The fields of an Architecture that nearly every family gives by the same keys.

    Args:
        settings: to take them from.
        eps: the class's own ``rms_norm_eps``, for a config that leaves it out; the rest likewise.
        tied: its ``tie_word_embeddings``.
        key_value_heads: its ``num_key_value_heads``; None is as many as heads.
        head_size: its ``head_dim``; None is hidden size / heads.
        theta: its ``rope_theta``.
        acts: activations that can be expressed, by their names there.
        act_key: where the activation stands.
        act: the class's own activation.
    """
    take = settings.take
    heads, hidden_size = take("num_attention_heads", int), take("hidden_size", int)
    sequence_length = take("max_position_embeddings", int)
    settings.training_only("attention_dropout")
    activation = take(act_key, str, act)
    if activation not in acts:
        raise settings.refusal(act_key, f"Modalities has {', '.join(acts)} here")
    return {
        "vocab_size": take("vocab_size", int),
        "sequence_length": sequence_length,
        "hidden_size": hidden_size,
        "layers": take("num_hidden_layers", int),
        "heads": heads,
        "key_value_heads": take("num_key_value_heads", int, key_value_heads or heads),
        "head_size": take("head_dim", int, head_size or hidden_size // max(heads, 1)),
        "intermediate_size": take("intermediate_size", int),
        "norm_eps": take("rms_norm_eps", float, eps),
        "activation": acts[activation],
        "tied_embeddings": take("tie_word_embeddings", bool, tied),
        **read_rope(settings, theta, sequence_length),
    }


def require_whole_heads(settings: Settings) -> None:
    """Refuse what the class itself refuses, whatever its ``head_dim``: heads that do not divide the hidden size."""
    hidden_size, heads = settings.take("hidden_size", int), settings.take("num_attention_heads", int)
    if hidden_size % max(heads, 1):
        kind = settings.values.get("model_type", "this family")
        raise settings.refusal("num_attention_heads", f"{kind} needs a divisor of hidden_size {hidden_size}")


def write_common(a: Architecture, act_key: str = "hidden_act") -> dict[str, Any]:
    """The settings that nearly every family has."""
    return {
        "vocab_size": a.vocab_size,
        "max_position_embeddings": a.sequence_length,
        "hidden_size": a.hidden_size,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.key_value_heads,
        "head_dim": a.head_size,
        "intermediate_size": a.intermediate_size,
        "rms_norm_eps": a.norm_eps,
        act_key: ACTS[a.activation],
        "tie_word_embeddings": a.tied_embeddings,
        "attention_dropout": 0.0,
        **write_rope(a),
    }


def one_window(settings: Settings, default: int | None) -> tuple[int | None, ...]:
    """One window for all layers; null is none, and a config that leaves it out means the class's own."""
    missing = "sliding_window" not in settings.values
    return (default if missing else settings.take("sliding_window", int, None),)


def widest(a: Architecture) -> int | None:
    """The window of the layers that have one."""
    return max((window for window in a.attention_windows if window is not None), default=None)


def layer_types(a: Architecture) -> list[str]:
    """Which layers have a window, in the words of transformers."""
    return ["full_attention" if a.window(layer) is None else "sliding_attention" for layer in range(a.layers)]


def read_qwen_windows(settings: Settings, layers: int) -> tuple[int | None, ...]:
    """Windows of the layers from ``max_window_layers`` on, where they are switched on at all."""
    on = settings.take("use_sliding_window", bool, False)
    window = one_window(settings, 4096)[0]
    first = settings.take("max_window_layers", int, 28)
    return layer_pattern(settings, layers, window if on else None, lambda layer: on and layer >= first)


def write_qwen_windows(a: Architecture) -> dict[str, Any]:
    """As layer types, and for earlier versions as the first layer that has one."""
    types = layer_types(a)
    first = types.index("sliding_attention") if "sliding_attention" in types else a.layers
    return {
        "use_sliding_window": widest(a) is not None,
        "sliding_window": widest(a),
        "max_window_layers": first,
        "layer_types": types,
    }
