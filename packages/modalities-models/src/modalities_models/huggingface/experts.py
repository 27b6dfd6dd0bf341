"""Mixtures of experts: one tensor per expert in theirs, one for all in ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from modalities_models.architecture import Architecture
from modalities_models.huggingface.common import (
    ATTENTION,
    FEEDFORWARD,
    OUTER,
    PRE_NORM,
    layer_types,
    one_window,
    read_common,
    widest,
    write_common,
    write_qwen_windows,
)
from modalities_models.huggingface.family import Family, Names, Shapes, layer_pattern, renamed
from modalities_models.huggingface.links import Link, Same, Stacked
from modalities_models.huggingface.settings import Settings
from modalities_models.nn.mixture_of_experts import MixtureOfExperts

BALANCED = 1e-3
"""The rate of a mixture that has a bias for its choice; the rate itself matters in training only."""

SHARED = {
    "feedforward.shared.gate": "mlp.shared_expert.gate_proj",
    "feedforward.shared.up": "mlp.shared_expert.up_proj",
    "feedforward.shared.down": "mlp.shared_expert.down_proj",
    "feedforward.shared_gate": "mlp.shared_expert_gate",
}
PLURAL_SHARED = {name: their.replace("shared_expert", "shared_experts") for name, their in SHARED.items()}
NAMES = Names(OUTER, ATTENTION | FEEDFORWARD | PRE_NORM | SHARED | {"feedforward.router": "mlp.gate"})
PLURAL_NAMES = replace(NAMES, inner={**NAMES.inner, **PLURAL_SHARED})
MIXTRAL_NAMES = replace(NAMES, inner={**NAMES.inner, "feedforward.router": "block_sparse_moe.gate"})
EXPERT = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
MIXTRAL_EXPERT = {"gate": "w1", "up": "w3", "down": "w2"}


def mixture(a: Architecture) -> MixtureOfExperts:
    """The mixture of a decoder; of one without, a mixture that no decoder has, so that it is found to differ."""
    return a.feedforward if isinstance(a.feedforward, MixtureOfExperts) else _NONE


_NONE = MixtureOfExperts(experts=1, experts_per_token=1, intermediate_size=1, balance_rate=0.0)


def _links(
    a: Architecture, shapes: Shapes, names: Names, where: str, expert: Mapping[str, str], balance: str
) -> list[Link]:
    experts = range(mixture(a).experts)
    others: list[Link] = []
    for name in shapes:
        *_, part, leaf = name.split(".")
        number = name.split(".")[1]
        if part == "feedforward" and leaf in expert:
            theirs = (f"model.layers.{number}.{where}.experts.{index}.{expert[leaf]}.weight" for index in experts)
            others.append(Stacked(name, tuple(theirs)))
        elif leaf == "balance":
            assert balance, "only families with a balance are asked for one"
            others.append(Same(name, f"model.layers.{number}.{where}.gate.{balance}"))
    return renamed(a, shapes, names, others)


def _mixtral_links(a: Architecture, shapes: Shapes) -> list[Link]:
    return _links(a, shapes, MIXTRAL_NAMES, "block_sparse_moe", MIXTRAL_EXPERT, "")


def _qwen_links(a: Architecture, shapes: Shapes) -> list[Link]:
    return _links(a, shapes, NAMES, "mlp", EXPERT, "")


def _balanced_links(a: Architecture, shapes: Shapes) -> list[Link]:
    return _links(a, shapes, PLURAL_NAMES, "mlp", EXPERT, "e_score_correction_bias")


def _read_mixtral(settings: Settings) -> Architecture:
    take = settings.take
    values = read_common(settings, eps=1e-5, key_value_heads=8, theta=1e6)
    experts = MixtureOfExperts(
        experts=take("num_local_experts", int, 8),
        experts_per_token=take("num_experts_per_tok", int, 2),
        intermediate_size=values["intermediate_size"],
        balance_rate=0.0,
    )
    return Architecture(**values, feedforward=experts, attention_windows=(take("sliding_window", int, None),))


def _write_mixtral(a: Architecture) -> dict[str, Any]:
    return write_common(a) | {
        "intermediate_size": mixture(a).intermediate_size,
        "num_local_experts": mixture(a).experts,
        "num_experts_per_tok": mixture(a).experts_per_token,
        "sliding_window": widest(a),
        "router_jitter_noise": 0.0,
    }


def _read_dense_layers(settings: Settings, layers: int) -> tuple[int, ...]:
    """Layers of a Qwen without experts: those named, and all but every so many."""
    named = settings.take("mlp_only_layers", list, [])
    step = settings.take("decoder_sparse_step", int, 1)
    return tuple(layer for layer in range(layers) if layer in named or (layer + 1) % max(step, 1))


def _read_qwen_experts(settings: Settings, layers: int, **shared: Any) -> MixtureOfExperts:
    take = settings.take
    count = take("num_local_experts", int, None)  # what later versions of transformers call it
    return MixtureOfExperts(
        experts=take("num_experts", int) if count is None else count,
        experts_per_token=take("num_experts_per_tok", int),
        intermediate_size=take("moe_intermediate_size", int),
        normalize_weights=take("norm_topk_prob", bool, False),
        balance_rate=0.0,
        dense_layers=_read_dense_layers(settings, layers),
        **shared,
    )


def _write_qwen_experts(a: Architecture) -> dict[str, Any]:
    return {
        "num_experts": mixture(a).experts,
        "num_experts_per_tok": mixture(a).experts_per_token,
        "moe_intermediate_size": mixture(a).intermediate_size,
        "norm_topk_prob": mixture(a).normalize_weights,
        "mlp_only_layers": list(mixture(a).dense_layers),
        "decoder_sparse_step": 1,
    }


def _read_qwen2_moe(settings: Settings) -> Architecture:
    values = read_common(settings, key_value_heads=16)
    layers = values["layers"]
    shared = settings.take("shared_expert_intermediate_size", int, 5632)
    experts = _read_qwen_experts(settings, layers, shared_intermediate_size=shared, shared_gate=True)
    on = settings.take("use_sliding_window", bool, False)
    window = settings.take("sliding_window", int, 4096)
    first = settings.take("max_window_layers", int, 28)
    windows = layer_pattern(
        settings, layers, window if on else None, lambda layer: on and layer % 2 == 0 and layer < first
    )
    qkv = settings.take("qkv_bias", bool, True)
    return Architecture(**values, query_key_value_bias=qkv, feedforward=experts, attention_windows=windows)


def _write_qwen2_moe(a: Architecture) -> dict[str, Any]:
    return (
        write_common(a)
        | write_qwen_windows(a)
        | _write_qwen_experts(a)
        | {
            "shared_expert_intermediate_size": mixture(a).shared_intermediate_size or 0,
            "qkv_bias": a.has_query_key_value_bias,
        }
    )


def _read_qwen3_moe(settings: Settings) -> Architecture:
    values = read_common(settings, key_value_heads=4)
    settings.require("attention_bias", False, False)
    window = settings.take("sliding_window", int, 4096)
    on = settings.take("use_sliding_window", bool, False)
    experts = _read_qwen_experts(settings, values["layers"])
    settings.take("max_window_layers", int, None)
    return Architecture(
        **values, query_key_norm="head", feedforward=experts, attention_windows=(window if on else None,)
    )


def _write_qwen3_moe(a: Architecture) -> dict[str, Any]:
    windows = {"use_sliding_window": widest(a) is not None, "sliding_window": widest(a)}
    return write_common(a) | _write_qwen_experts(a) | windows


def _read_olmoe(settings: Settings) -> Architecture:
    take = settings.take
    settings.require("attention_bias", False, False)
    if take("clip_qkv", float, None) is not None:
        raise settings.refusal("clip_qkv", "Modalities does not clip queries, keys and values")
    values = read_common(settings, eps=1e-5)
    experts = MixtureOfExperts(
        experts=take("num_experts", int, 64),
        experts_per_token=take("num_experts_per_tok", int, 8),
        intermediate_size=values["intermediate_size"],
        normalize_weights=take("norm_topk_prob", bool, False),
        balance_rate=0.0,
    )
    return Architecture(**values, query_key_norm="projection", feedforward=experts)


def _write_olmoe(a: Architecture) -> dict[str, Any]:
    values = write_common(a) | {
        "intermediate_size": mixture(a).intermediate_size,
        "num_experts": mixture(a).experts,
        "num_experts_per_tok": mixture(a).experts_per_token,
        "norm_topk_prob": mixture(a).normalize_weights,
    }
    del values["head_dim"]  # its norms of queries and keys are as wide as the hidden size, whatever this says
    return values


def _read_balanced(settings: Settings, layers: int) -> MixtureOfExperts:
    """DeepSeek-V3's choice by sigmoid and bias, without groups of experts."""
    take = settings.take
    settings.require("n_group", 1, 1)
    settings.require("topk_group", 1, 1)
    settings.require("routed_scaling_factor", (1.0, 1), 1.0)
    settings.require("scoring_func", "sigmoid", "sigmoid")
    settings.require("topk_method", "noaux_tc", "noaux_tc")
    inner, shared = take("moe_intermediate_size", int), take("n_shared_experts", int)
    return MixtureOfExperts(
        experts=take("n_routed_experts", int),
        experts_per_token=take("num_experts_per_tok", int),
        intermediate_size=inner,
        shared_intermediate_size=inner * shared,
        normalize_weights=take("norm_topk_prob", bool),
        score="sigmoid",
        balance_rate=BALANCED,
        dense_layers=tuple(range(min(take("first_k_dense_replace", int), layers))),
    )


def _write_balanced(a: Architecture) -> dict[str, Any]:
    it = mixture(a)
    return {
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "moe_intermediate_size": it.intermediate_size,
        "n_shared_experts": (it.shared_intermediate_size or 0) // it.intermediate_size,
        "n_routed_experts": it.experts,
        "num_experts_per_tok": it.experts_per_token,
        "norm_topk_prob": it.normalize_weights,
        "first_k_dense_replace": len(it.dense_layers),
        "attention_bias": a.has_query_key_value_bias,
    }


def _read_dots1(settings: Settings) -> Architecture:
    values = read_common(settings)
    settings.require("attention_bias", False, False)
    experts = _read_balanced(settings, values["layers"])
    window = one_window(settings, 4096)[0]
    first = settings.take("max_window_layers", int, 62)
    windows = layer_pattern(settings, values["layers"], window, lambda layer: window is not None and layer >= first)
    return Architecture(**values, query_key_norm="head", feedforward=experts, attention_windows=windows)


def _write_dots1(a: Architecture) -> dict[str, Any]:
    windows = {"sliding_window": widest(a), "layer_types": layer_types(a)}
    return write_common(a) | _write_balanced(a) | windows


def _read_glm4_moe(settings: Settings) -> Architecture:
    rope = settings.values.get("rope_parameters") or {}
    if (settings.values.get("partial_rotary_factor") or rope.get("partial_rotary_factor")) not in (1, 1.0):
        raise settings.refusal("partial_rotary_factor", "Modalities turns all of every head; null here means half")
    values = read_common(settings, eps=1e-5, key_value_heads=8)
    for key in ("num_nextn_predict_layers", "num_mtp_layers"):
        settings.take(key, int, None)  # layers that only speculative decoding uses
    return Architecture(
        **values,
        query_key_value_bias=settings.take("attention_bias", bool, False),
        query_key_norm="head" if settings.take("use_qk_norm", bool, False) else "none",
        feedforward=_read_balanced(settings, values["layers"]),
    )


def _write_glm4_moe(a: Architecture) -> dict[str, Any]:
    more = {"use_qk_norm": a.query_key_norm == "head", "partial_rotary_factor": 1.0}
    return write_common(a) | _write_balanced(a) | more


MIXTRAL = Family("mixtral", "MixtralForCausalLM", _read_mixtral, _write_mixtral, _mixtral_links)
QWEN2_MOE = Family("qwen2_moe", "Qwen2MoeForCausalLM", _read_qwen2_moe, _write_qwen2_moe, _qwen_links)
QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", _read_qwen3_moe, _write_qwen3_moe, _qwen_links)
OLMOE = Family("olmoe", "OlmoeForCausalLM", _read_olmoe, _write_olmoe, _qwen_links)
DOTS1 = Family("dots1", "Dots1ForCausalLM", _read_dots1, _write_dots1, _balanced_links)
GLM4_MOE = Family("glm4_moe", "Glm4MoeForCausalLM", _read_glm4_moe, _write_glm4_moe, _balanced_links)
