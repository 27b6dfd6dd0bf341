"""Rotary positions in config.json: ``rope_theta`` and ``rope_scaling``, or both in ``rope_parameters``."""

from __future__ import annotations

import math
from typing import Any

from modalities_models.architecture import Architecture
from modalities_models.huggingface.settings import Settings
from modalities_models.nn.rope_scaling import Linear, Llama3, Ntk, Yarn
from modalities_models.parts import RopeScaling

LAYER_TYPES = ("full_attention", "sliding_attention")
KNOWN = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "yarn": frozenset(
        (
            *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
            *("mscale", "mscale_all_dim", "truncate"),
        )
    ),
    "llama3": frozenset({"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}),
}
"""Rope types, and the keys of each."""


def read_rope(settings: Settings, default_theta: float, sequence_length: int) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling`` of an Architecture.

    Args:
        settings: to take them from.
        default_theta: of the class, for a config without one.
        sequence_length: the config's ``max_position_embeddings``.

    Raises:
        CheckpointError: a rope type or a setting of it is not known.
    """
    outer_theta = settings.take("rope_theta", float, default_theta)
    old, new = settings.take("rope_scaling", dict, None), settings.take("rope_parameters", dict, None)
    key = "rope_scaling" if old else "rope_parameters"
    values = _one_for_all(settings, key, dict(old or new or {}))
    rope_type = values.pop("rope_type", None) or values.get("type") or "default"
    values.pop("type", None)
    theta = values.pop("rope_theta", None) or outer_theta
    if rope_type not in KNOWN:
        raise settings.refusal(key, f"rope type {rope_type!r} is none of {', '.join(KNOWN)}")
    for partial in (values.pop("partial_rotary_factor", None), settings.take("partial_rotary_factor", float, None)):
        if partial not in (None, 1, 1.0):
            raise settings.refusal(key, f"only {partial} of every head is turned; Modalities turns all of it")
    original = settings.take("original_max_position_embeddings", int, None)
    if original is not None and rope_type in ("yarn", "llama3"):
        values["original_max_position_embeddings"] = original
    values = {name: value for name, value in values.items() if value is not None}
    # transformers itself adds the original length to types that make no use of it.
    if unknown := values.keys() - KNOWN[rope_type] - {"original_max_position_embeddings"}:
        raise settings.refusal(key, f"rope type {rope_type!r} with {', '.join(sorted(unknown))} is not known")
    return {"rope_theta": float(theta), "rope_scaling": _scaling(settings, key, rope_type, values, sequence_length)}


def write_rope(a: Architecture) -> dict[str, Any]:
    """The same in the keys of old and of new versions of transformers."""
    theta, scaling = plain(a)
    scaled = _parameters(scaling)
    return {
        "rope_theta": theta,
        "rope_scaling": scaled,
        "rope_parameters": {"rope_theta": theta, **(scaled or {"rope_type": "default"})},
    }


def plain(a: Architecture) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, where a scaling that comes to no more than another theta is that theta."""
    scaling = a.rope_scaling
    if not isinstance(scaling, Ntk):
        return a.rope_theta, scaling
    longer = max(a.sequence_length, scaling.original_length) / scaling.original_length
    growth = (scaling.factor * longer - (scaling.factor - 1)) ** (a.head_size / (a.head_size - 2))
    return a.rope_theta * growth, None


def _one_for_all(settings: Settings, key: str, values: dict[str, Any]) -> dict[str, Any]:
    """The settings of all layers, from one set, or from one for each type of layer if these are equal."""
    if not any(name in values for name in LAYER_TYPES):
        return values
    each = [values[name] for name in LAYER_TYPES if values.get(name) is not None]
    if any(one != each[0] for one in each):
        raise settings.refusal(key, "layers with and without a window turn by different angles")
    return dict(each[0])


def _scaling(settings: Settings, key: str, kind: str, values: dict[str, Any], length: int) -> RopeScaling | None:
    if kind == "default":
        return None
    original = int(values.get("original_max_position_embeddings", length))
    try:
        factor = float(values["factor"])
        if kind == "linear":
            return Linear(factor)
        if kind == "dynamic":
            # What lies beyond the length of the config is another function of every input's length there.
            return Ntk(original_length=length, factor=factor)
        if kind == "llama3":
            return Llama3(factor, original, float(values["low_freq_factor"]), float(values["high_freq_factor"]))
    except KeyError as error:
        raise settings.refusal(key, f"rope type {kind!r} needs {error}") from error
    return Yarn(
        factor=factor,
        original_length=original,
        attention_factor=_attention_factor(factor, values),
        beta_fast=float(values.get("beta_fast") or 32.0),
        beta_slow=float(values.get("beta_slow") or 1.0),
        truncate=bool(values.get("truncate", True)),
    )


def _attention_factor(factor: float, values: dict[str, Any]) -> float | None:
    """YaRN's factor on cosines and sines; DeepSeek's two mscales give it as a quotient."""
    if "attention_factor" in values:
        return float(values["attention_factor"])
    above, below = values.get("mscale"), values.get("mscale_all_dim")
    if not (above and below) or factor <= 1:
        return None
    return (0.1 * above * math.log(factor) + 1.0) / (0.1 * below * math.log(factor) + 1.0)


def _parameters(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """A scaling in the words of transformers; None is none, or one that these have no word for."""
    if isinstance(scaling, Linear):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, Llama3):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_length,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
        }
    if isinstance(scaling, Yarn):
        values = {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_length,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
        }
        return values if scaling.attention_factor is None else values | {"attention_factor": scaling.attention_factor}
    return None
