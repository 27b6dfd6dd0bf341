"""Settings that most families share, and the families that differ from Llama in little more than names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modalities_models.architecture import Architecture
from modalities_models.huggingface.family import Family, Names, Shapes, layer_pattern, renamed
from modalities_models.huggingface.links import Joined, Link
from modalities_models.huggingface.rope import LAYER_TYPES, read_rope, write_rope
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
LLAMA_NAMES = Names(OUTER, ATTENTION | FEEDFORWARD | PRE_NORM)
POST_NAMES = Names(OUTER, ATTENTION | FEEDFORWARD | POST_NORM)


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


def _llama_links(a: Architecture, shapes: Shapes) -> list[Link]:
    return renamed(a, shapes, LLAMA_NAMES)


def _post_links(a: Architecture, shapes: Shapes) -> list[Link]:
    return renamed(a, shapes, POST_NAMES)


def _read_llama(settings: Settings) -> Architecture:
    require_whole_heads(settings)
    bias = settings.take("attention_bias", bool, False)
    settings.require("mlp_bias", bias, False)
    return Architecture(**read_common(settings), bias=bias)


def _write_llama(a: Architecture) -> dict[str, Any]:
    return write_common(a) | {"attention_bias": a.bias, "mlp_bias": a.bias}


def _read_arcee(settings: Settings) -> Architecture:
    require_whole_heads(settings)
    bias = settings.take("attention_bias", bool, False)
    settings.require("mlp_bias", bias, False)
    return Architecture(**read_common(settings, eps=1e-5, acts=PLAIN_BY, act="relu2"), bias=bias)


def _window(settings: Settings, default: int | None) -> tuple[int | None, ...]:
    """One window for all layers; null is none, and a config that leaves it out means the class's own."""
    missing = "sliding_window" not in settings.values
    return (default if missing else settings.take("sliding_window", int, None),)


def widest(a: Architecture) -> int | None:
    """The window of the layers that have one."""
    return max((window for window in a.attention_windows if window is not None), default=None)


def layer_types(a: Architecture) -> list[str]:
    """Which layers have a window, in the words of transformers."""
    return ["full_attention" if a.window(layer) is None else "sliding_attention" for layer in range(a.layers)]


def _read_mistral(settings: Settings) -> Architecture:
    return Architecture(**read_common(settings, key_value_heads=8), attention_windows=_window(settings, 4096))


def _write_mistral(a: Architecture) -> dict[str, Any]:
    return write_common(a) | {"sliding_window": widest(a)}


def _read_ministral(settings: Settings) -> Architecture:
    values = read_common(settings, key_value_heads=8)
    window = _window(settings, 4096)[0]
    windows = layer_pattern(settings, values["layers"], window, lambda layer: window is not None)
    return Architecture(**values, attention_windows=windows)


def read_qwen_windows(settings: Settings, layers: int) -> tuple[int | None, ...]:
    """Windows of the layers from ``max_window_layers`` on, where they are switched on at all."""
    on = settings.take("use_sliding_window", bool, False)
    window = settings.take("sliding_window", int, 4096) if "sliding_window" not in settings.values else None
    window = settings.take("sliding_window", int, window) if on else None
    settings.take("sliding_window", int, None)
    first = settings.take("max_window_layers", int, 28)
    return layer_pattern(settings, layers, window, lambda layer: window is not None and layer >= first)


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


def _read_qwen2(settings: Settings) -> Architecture:
    values = read_common(settings, key_value_heads=32)
    windows = read_qwen_windows(settings, values["layers"])
    return Architecture(**values, query_key_value_bias=True, attention_windows=windows)


def _write_qwen(a: Architecture) -> dict[str, Any]:
    return write_common(a) | write_qwen_windows(a)


def _read_qwen3(settings: Settings) -> Architecture:
    values = read_common(settings, key_value_heads=32, head_size=128)
    windows = read_qwen_windows(settings, values["layers"])
    settings.require("attention_bias", False, False)
    return Architecture(**values, query_key_norm="head", attention_windows=windows)


def _read_seed_oss(settings: Settings) -> Architecture:
    qkv = settings.take("attention_bias", bool, True)
    bias = settings.take("attention_out_bias", bool, False)
    settings.require("mlp_bias", bias, False)
    settings.training_only("residual_dropout")
    values = read_common(settings, key_value_heads=8, head_size=128)
    return Architecture(**values, bias=bias, query_key_value_bias=qkv)


def _write_seed_oss(a: Architecture) -> dict[str, Any]:
    biases = {"attention_bias": a.has_query_key_value_bias, "attention_out_bias": a.bias, "mlp_bias": a.bias}
    return write_common(a) | biases | {"residual_dropout": 0.0}


def _read_granite(settings: Settings) -> Architecture:
    bias = settings.take("attention_bias", bool, False)
    settings.require("mlp_bias", bias, False)
    return Architecture(
        **read_common(settings),
        bias=bias,
        embedding_multiplier=settings.take("embedding_multiplier", float, 1.0),
        residual_multiplier=settings.take("residual_multiplier", float, 1.0),
        attention_scale=settings.take("attention_multiplier", float, 1.0),
        logit_multiplier=1.0 / settings.take("logits_scaling", float, 1.0),
    )


def _write_granite(a: Architecture) -> dict[str, Any]:
    return _write_llama(a) | {
        "embedding_multiplier": a.embedding_multiplier,
        "residual_multiplier": a.residual_multiplier,
        "attention_multiplier": a.head_size**-0.5 if a.attention_scale is None else a.attention_scale,
        "logits_scaling": 1.0 / a.logit_multiplier,
    }


def _read_olmo2(settings: Settings) -> Architecture:
    settings.require("attention_bias", False, False)
    return Architecture(**read_common(settings, eps=1e-5), norm_placement="post", query_key_norm="projection")


def _read_olmo3(settings: Settings) -> Architecture:
    settings.require("attention_bias", False, False)
    if settings.values.get("rope_scaling"):
        raise settings.refusal("rope_scaling", "layers with and without a window turn by different angles")
    values = read_common(settings, eps=1e-5, theta=500_000.0)
    window = _window(settings, 4096)[0]
    windows = layer_pattern(settings, values["layers"], window, lambda layer: bool((layer + 1) % 4))
    return Architecture(**values, norm_placement="post", query_key_norm="projection", attention_windows=windows)


def _write_patterned(a: Architecture) -> dict[str, Any]:
    return write_common(a) | {"sliding_window": widest(a), "layer_types": layer_types(a)}


def _write_olmo3(a: Architecture) -> dict[str, Any]:
    values = _write_patterned(a)
    return values | {"rope_scaling": None, "rope_parameters": dict.fromkeys(LAYER_TYPES, values["rope_parameters"])}


def _read_phi3(settings: Settings) -> Architecture:
    for key in ("resid_pdrop", "embd_pdrop"):
        settings.training_only(key)
    return Architecture(**read_common(settings, eps=1e-5), attention_windows=_window(settings, None))


def _phi3_links(a: Architecture, shapes: Shapes) -> list[Link]:
    query, other = a.heads * a.head_size, a.key_value_heads * a.head_size
    fused: list[Link] = []
    for layer in range(a.layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        attention = tuple(f"{ours}attention.{part}.weight" for part in ("query", "key", "value"))
        fused.append(Joined(attention, f"{theirs}self_attn.qkv_proj.weight", (query, other, other)))
        gate_up = tuple(f"{ours}feedforward.{part}.weight" for part in ("gate", "up"))
        fused.append(Joined(gate_up, f"{theirs}mlp.gate_up_proj.weight", (a.intermediate_size,) * 2))
    return renamed(a, shapes, LLAMA_NAMES, fused)


LLAMA = Family("llama", "LlamaForCausalLM", _read_llama, _write_llama, _llama_links)
MISTRAL = Family("mistral", "MistralForCausalLM", _read_mistral, _write_mistral, _llama_links)
MINISTRAL = Family("ministral", "MinistralForCausalLM", _read_ministral, _write_patterned, _llama_links)
QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen, _llama_links)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen, _llama_links)
SEED_OSS = Family("seed_oss", "SeedOssForCausalLM", _read_seed_oss, _write_seed_oss, _llama_links)
GRANITE = Family("granite", "GraniteForCausalLM", _read_granite, _write_granite, _llama_links)
ARCEE = Family("arcee", "ArceeForCausalLM", _read_arcee, _write_llama, _llama_links)
PHI3 = Family("phi3", "Phi3ForCausalLM", _read_phi3, _write_mistral, _phi3_links)
OLMO2 = Family("olmo2", "Olmo2ForCausalLM", _read_olmo2, write_common, _post_links)
OLMO3 = Family("olmo3", "Olmo3ForCausalLM", _read_olmo3, _write_olmo3, _post_links)
