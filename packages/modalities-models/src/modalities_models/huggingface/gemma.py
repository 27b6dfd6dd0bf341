"""Gemma: embeddings times sqrt(hidden size), norm scales kept as their distance from one, GeGLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modalities_models.architecture import Architecture, NormPlacement
from modalities_models.huggingface.common import (
    ATTENTION,
    FEEDFORWARD,
    OUTER,
    PRE_NORM,
    layer_types,
    one_window,
    read_common,
    require_whole_heads,
    widest,
    write_common,
)
from modalities_models.huggingface.family import Family, Names, Shapes, layer_pattern, renamed
from modalities_models.huggingface.links import Link, OneLess
from modalities_models.huggingface.settings import Settings
from modalities_models.parts import Activation

GEMMA_NAMES = Names(OUTER, ATTENTION | FEEDFORWARD | PRE_NORM, scale=OneLess)
BEFORE = {"attention_norm": "input_layernorm", "feedforward_norm": "pre_feedforward_layernorm"}
VAULT_NAMES = Names(OUTER, ATTENTION | FEEDFORWARD | BEFORE, scale=OneLess)
SANDWICH_NAMES = Names(
    OUTER,
    ATTENTION
    | FEEDFORWARD
    | BEFORE
    | {
        "attention_output_norm": "post_attention_layernorm",
        "feedforward_output_norm": "post_feedforward_layernorm",
    },
    scale=OneLess,
)
TANH_GELU: Mapping[str, Activation] = {"gelu_pytorch_tanh": "geglu"}


def _read_gemma(settings: Settings) -> Architecture:
    # The first release called it gelu and computed its tanh form; transformers reads it so.
    settings.require("hidden_activation", "gelu_pytorch_tanh")
    settings.require("attention_bias", False, False)
    settings.require("use_bidirectional_attention", False, False)
    values = read_common(
        settings,
        tied=True,
        key_value_heads=16,
        head_size=256,
        acts={**TANH_GELU, "gelu": "geglu"},
        act="gelu_pytorch_tanh",
    )
    return Architecture(**values, embedding_multiplier=values["hidden_size"] ** 0.5)


def _write_gemma(a: Architecture) -> dict[str, Any]:
    return write_common(a) | {"hidden_activation": write_common(a)["hidden_act"]}


def _read_capped(settings: Settings, placement: NormPlacement) -> Architecture:
    """Gemma 2 and VaultGemma, which differ in where their norms stand."""
    require_whole_heads(settings)
    settings.require("attention_bias", False, False)
    settings.require("use_bidirectional_attention", False, False)
    settings.take("hidden_act", str, None)  # what these classes read is hidden_activation
    values = read_common(
        settings,
        tied=True,
        key_value_heads=4,
        head_size=256,
        acts=TANH_GELU,
        act_key="hidden_activation",
        act="gelu_pytorch_tanh",
    )
    window = one_window(settings, 4096)[0]
    windows = layer_pattern(settings, values["layers"], window, lambda layer: layer % 2 == 0)
    caps: dict[str, Any] = {
        name: (default if key not in settings.values else settings.take(key, float, None))
        for name, key, default in (
            ("attention_softcap", "attn_logit_softcapping", 50.0),
            ("logit_softcap", "final_logit_softcapping", 30.0),
        )
    }
    return Architecture(
        **values,
        **caps,
        norm_placement=placement,
        attention_windows=windows,
        attention_scale=settings.take("query_pre_attn_scalar", float, 256.0) ** -0.5,
        embedding_multiplier=values["hidden_size"] ** 0.5,
    )


def _write_capped(a: Architecture) -> dict[str, Any]:
    return write_common(a, act_key="hidden_activation") | {
        "query_pre_attn_scalar": a.head_size if a.attention_scale is None else round(a.attention_scale**-2),
        "attn_logit_softcapping": a.attention_softcap,
        "final_logit_softcapping": a.logit_softcap,
        "sliding_window": widest(a) or a.sequence_length,  # needed even where no layer has one
        "layer_types": layer_types(a),
        "attention_bias": False,
    }


def _gemma_links(a: Architecture, shapes: Shapes) -> list[Link]:
    return renamed(a, shapes, GEMMA_NAMES)


def _sandwich_links(a: Architecture, shapes: Shapes) -> list[Link]:
    return renamed(a, shapes, SANDWICH_NAMES)


def _vault_links(a: Architecture, shapes: Shapes) -> list[Link]:
    return renamed(a, shapes, VAULT_NAMES)


GEMMA = Family("gemma", "GemmaForCausalLM", _read_gemma, _write_gemma, _gemma_links)
GEMMA2 = Family("gemma2", "Gemma2ForCausalLM", lambda s: _read_capped(s, "sandwich"), _write_capped, _sandwich_links)
VAULTGEMMA = Family(
    "vaultgemma", "VaultGemmaForCausalLM", lambda s: _read_capped(s, "pre"), _write_capped, _vault_links
)
