"""Dense models that differ from Llama in little more than names."""

from __future__ import annotations

from typing import Any

from modalities_models.architecture import Architecture
from modalities_models.huggingface.common import (
    ATTENTION,
    FEEDFORWARD,
    OUTER,
    PLAIN_BY,
    POST_NORM,
    PRE_NORM,
    layer_types,
    one_window,
    read_common,
    read_qwen_windows,
    require_whole_heads,
    widest,
    write_common,
    write_qwen_windows,
)
from modalities_models.huggingface.family import Family, Names, Shapes, layer_pattern, renamed
from modalities_models.huggingface.links import Joined, Link
from modalities_models.huggingface.rope import LAYER_TYPES
from modalities_models.huggingface.settings import Settings

LLAMA_NAMES = Names(OUTER, ATTENTION | FEEDFORWARD | PRE_NORM)
POST_NAMES = Names(OUTER, ATTENTION | FEEDFORWARD | POST_NORM)


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


def _read_mistral(settings: Settings) -> Architecture:
    return Architecture(**read_common(settings, key_value_heads=8), attention_windows=one_window(settings, 4096))


def _write_mistral(a: Architecture) -> dict[str, Any]:
    return write_common(a) | {"sliding_window": widest(a)}


def _read_ministral(settings: Settings) -> Architecture:
    values = read_common(settings, key_value_heads=8)
    window = one_window(settings, 4096)[0]
    windows = layer_pattern(settings, values["layers"], window, lambda layer: window is not None)
    return Architecture(**values, attention_windows=windows)


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
    window = one_window(settings, 4096)[0]
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
    return Architecture(**read_common(settings, eps=1e-5), attention_windows=one_window(settings, None))


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
