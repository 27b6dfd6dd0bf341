"""Named sizes of decoders, and how a preset and overrides become one architecture.

What a preset leaves out follows from the rest: head_size is hidden_size / heads, key_value_heads is heads,
intermediate_size follows from hidden_size and activation, and the remaining arguments are those of ``Architecture``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from modalities_core.errors import ConfigError
from modalities_models.architecture import Architecture, derived_head_size, derived_intermediate_size
from modalities_models.nn.mixture_of_experts import MixtureOfExperts

_GALORE = {"norm_eps": 1e-6, "vocab_size": 32_000}
_MISTRAL = {
    "vocab_size": 32_000,
    "sequence_length": 32_768,
    "hidden_size": 4096,
    "layers": 32,
    "heads": 32,
    "key_value_heads": 8,
    "intermediate_size": 14_336,
}

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # 0.98M: for tests.
        "nano": {
            "vocab_size": 1024,
            "sequence_length": 256,
            "hidden_size": 128,
            "layers": 4,
            "heads": 4,
            "tied_embeddings": True,
        },
        # 2.1M: learns something in two minutes on two CPU cores.
        "quickstart": {
            "vocab_size": 2048,
            "sequence_length": 128,
            "hidden_size": 192,
            "layers": 3,
            "heads": 3,
        },
        # 58M, of the pre-training comparisons in arXiv:2403.03507.
        "llama-60m": _GALORE
        | {"sequence_length": 1024, "hidden_size": 512, "layers": 8, "heads": 8, "intermediate_size": 1376},
        # 124M, the smallest GPT-2.
        "gpt2": {
            "vocab_size": 50_257,
            "sequence_length": 1024,
            "hidden_size": 768,
            "layers": 12,
            "heads": 12,
            "norm": "layer",
            "activation": "gelu",
            "positions": "absolute",
            "bias": True,
            "tied_embeddings": True,
        },
        # 162M, of arXiv:2305.09781.
        "llama-160m": _GALORE
        | {"sequence_length": 2048, "hidden_size": 768, "layers": 12, "heads": 12, "intermediate_size": 3072},
        # 488M, our own step between the published sizes.
        "llama-500m": {
            "vocab_size": 32_000,
            "sequence_length": 2048,
            "hidden_size": 1280,
            "layers": 20,
            "heads": 20,
            "intermediate_size": 3584,
        },
        # 1.10B, the shape of TinyLlama, arXiv:2401.02385.
        "llama-1b": {
            "vocab_size": 32_000,
            "sequence_length": 2048,
            "hidden_size": 2048,
            "layers": 22,
            "heads": 32,
            "key_value_heads": 4,
            "intermediate_size": 5632,
        },
        # 8.03B, arXiv:2407.21783.
        "llama3-8b": {
            "vocab_size": 128_256,
            "sequence_length": 8192,
            "hidden_size": 4096,
            "layers": 32,
            "heads": 32,
            "key_value_heads": 8,
            "intermediate_size": 14_336,
            "rope_theta": 500_000.0,
        },
        # 596M, arXiv:2505.09388.
        "qwen3-0.6b": {
            "vocab_size": 151_936,
            "sequence_length": 40_960,
            "hidden_size": 1024,
            "layers": 28,
            "heads": 16,
            "key_value_heads": 8,
            "head_size": 128,
            "intermediate_size": 3072,
            "norm_eps": 1e-6,
            "rope_theta": 1_000_000.0,
            "query_key_norm": "head",
            "tied_embeddings": True,
        },
        # 494M, arXiv:2412.15115.
        "qwen2.5-0.5b": {
            "vocab_size": 151_936,
            "sequence_length": 32_768,
            "hidden_size": 896,
            "layers": 24,
            "heads": 14,
            "key_value_heads": 2,
            "intermediate_size": 4864,
            "norm_eps": 1e-6,
            "rope_theta": 1_000_000.0,
            "query_key_value_bias": True,
            "tied_embeddings": True,
        },
        # 1.48B, arXiv:2501.00656.
        "olmo2-1b": {
            "vocab_size": 100_352,
            "sequence_length": 4096,
            "hidden_size": 2048,
            "layers": 16,
            "heads": 16,
            "intermediate_size": 8192,
            "norm_eps": 1e-6,
            "norm_placement": "post",
            "rope_theta": 500_000.0,
            "query_key_norm": "projection",
        },
        # 2.61B, arXiv:2408.00118.
        "gemma2-2b": {
            "vocab_size": 256_000,
            "sequence_length": 8192,
            "hidden_size": 2304,
            "layers": 26,
            "heads": 8,
            "key_value_heads": 4,
            "head_size": 256,
            "intermediate_size": 9216,
            "norm_eps": 1e-6,
            "norm_placement": "sandwich",
            "activation": "geglu",
            "attention_windows": (4096, None),
            "attention_scale": 256**-0.5,
            "attention_softcap": 50.0,
            "embedding_multiplier": 2304**0.5,
            "logit_softcap": 30.0,
            "tied_embeddings": True,
        },
        # 7.24B, arXiv:2310.06825.
        "mistral-7b": _MISTRAL | {"attention_windows": (4096,)},
        # 46.7B, of which a token passes through 12.9B, arXiv:2401.04088. As published, so without a balance.
        "mixtral-8x7b": _MISTRAL
        | {
            "rope_theta": 1_000_000.0,
            "feedforward": MixtureOfExperts(experts=8, experts_per_token=2, intermediate_size=14_336, balance_rate=0.0),
        },
        # 30.5B, of which a token passes through 3.3B, arXiv:2505.09388. As published, so without a balance.
        "qwen3-30b-a3b": {
            "vocab_size": 151_936,
            "sequence_length": 40_960,
            "hidden_size": 2048,
            "layers": 48,
            "heads": 32,
            "key_value_heads": 4,
            "head_size": 128,
            "intermediate_size": 6144,
            "norm_eps": 1e-6,
            "rope_theta": 1_000_000.0,
            "query_key_norm": "head",
            "feedforward": MixtureOfExperts(experts=128, experts_per_token=8, intermediate_size=768, balance_rate=0.0),
        },
    }
)

_REQUIRED = ("vocab_size", "sequence_length", "hidden_size", "layers", "heads")


def resolve(preset: str | None, overrides: Mapping[str, Any]) -> Architecture:
    """One architecture from a preset's defaults and whatever in ``overrides`` is not None.

    Raises:
        ConfigError: the preset is unknown, a needed number is missing, or the numbers are impossible.
    """
    values = dict(find(preset)) if preset is not None else {}
    values |= {name: value for name, value in overrides.items() if value is not None}
    if missing := [name for name in _REQUIRED if name not in values]:
        raise ConfigError(
            f"a decoder without a preset needs {', '.join(missing)}",
            hint=f"give them, or a preset: {', '.join(PRESETS)}",
        )
    if "head_size" not in values:
        values["head_size"] = derived_head_size(values["hidden_size"], values["heads"])
    values.setdefault("key_value_heads", values["heads"])
    if "intermediate_size" not in values:
        values["intermediate_size"] = derived_intermediate_size(
            values["hidden_size"], values.get("activation", "swiglu")
        )
    return Architecture(**values)


def find(preset: str) -> Mapping[str, Any]:
    """The defaults of a preset.

    Raises:
        ConfigError: there is none of that name; the nearest names are listed.
    """
    if preset in PRESETS:
        return PRESETS[preset]
    near = difflib.get_close_matches(preset.lower(), PRESETS, n=3, cutoff=0.4)
    suggestion = f"did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(
        f"unknown preset {preset!r}", hint=f"{suggestion}presets: {', '.join(PRESETS)}", about=(None, "preset")
    )
