"""Which class of transformers a folder or a ``model_type`` means, with which config."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modalities_core.errors import CheckpointError, ConfigError
from modalities_core.spelling import did_you_mean
from modalities_models.huggingface.settings import read_settings

log = logging.getLogger("modalities")

EARLIEST = 5
"""Version of transformers: many classes of earlier ones let packed documents see each other."""
OTHER_ORDER = frozenset(("cpmant", "flaubert", "reformer", "xlm", "xlnet"))
"""Types whose classes do not read from left to right by themselves, one token seeing only those before it."""


@dataclass(frozen=True, slots=True)
class Description:
    """A causal language model that can be built.

    cls: its class.
    config: its config.
    weights: folder to read weights from; None is random ones.
    """

    cls: Any
    config: Any
    weights: Path | None

    @property
    def class_name(self) -> str:
        """Of the class."""
        return self.cls.__name__

    @property
    def longest(self) -> int | None:
        """The longest input that the config speaks of."""
        found = (getattr(self.config, name, None) for name in ("max_position_embeddings", "max_seq_len", "n_positions"))
        return next((value for value in found if isinstance(value, int) and value > 0), None)

    def build(self) -> nn.Module:
        """The model, in float32.

        Raises:
            ConfigError: the class refuses its config.
        """
        try:
            network = self.cls._from_config(self.config, dtype=torch.float32)
        except Exception as error:  # whatever a class of any kind says about numbers it cannot follow
            raise ConfigError(f"{self.class_name} refuses its config: {_first_line(error)}") from error
        reads_both_ways = "is_decoder" in inspect.getsource(self.cls.__init__)
        if self.config.model_type in OTHER_ORDER or (reads_both_ways and not network.config.is_decoder):
            raise ConfigError(
                f"a {self.class_name} of this config lets tokens see what comes after them, so it is no language model",
                hint="some classes have a config for that: {is_decoder: true}",
            )
        return network


def describe(
    path: Path | None, model_type: str | None, changes: dict[str, Any], weights: str | None, attention: str
) -> Description:
    """Find class and config; see ``model.huggingface`` for the arguments.

    Raises:
        ConfigError: transformers is missing, or the arguments do not name a causal language model.
        CheckpointError: there is no such folder.
    """
    transformers = _library()
    if (path is None) == (model_type is None):
        raise ConfigError("give either `path`, a folder with config.json, or `model_type`")
    if path is None and weights == "pretrained":
        raise ConfigError("pretrained weights need `path`, the folder to read them from")
    values = {} if path is None else read_settings(path).values
    if "quantization_config" in values:
        raise CheckpointError(f"{path} says that the weights are quantized", hint="take the ones before quantization")
    if values.pop("auto_map", None):
        log.warning("%s names code of its own (auto_map); it is ignored, no such code is ever run", path)
    kind = str(values.get("model_type") if model_type is None else model_type)
    config_class, cls = _classes(transformers, kind)
    _refuse_unknown(config_class, changes)
    own = config_class.attribute_map
    values |= {own.get(key, key): value for key, value in changes.items()}
    try:
        config = config_class.from_dict(values)
    except Exception as error:  # each config class has checks of its own
        raise ConfigError(f"transformers refuses this config of {kind}: {_first_line(error)}") from error
    # Set on the config, so that it is chosen for every part of the model.
    config._attn_implementation = None if attention == "auto" else attention
    return Description(cls, config, None if weights == "random" else path)


def _classes(transformers: Any, kind: str) -> tuple[Any, Any]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if kind not in CONFIG_MAPPING:
        raise ConfigError(
            f"transformers {transformers.__version__} has no models of type `{kind}`"
            f"{did_you_mean(kind, CONFIG_MAPPING.keys())}",
            hint="code that comes with weights is never run",
        )
    config_class = CONFIG_MAPPING[kind]
    if config_class not in known:
        raise ConfigError(f"transformers has no causal language model of type `{kind}`")
    parts = dict(getattr(config_class, "sub_configs", None) or {}).values()
    # Some configs have sections that belong to no model, such as one for attention.
    if any(getattr(part, "model_type", "") in CONFIG_MAPPING or part is transformers.AutoConfig for part in parts):
        raise ConfigError(
            f"models of type `{kind}` have several parts, such as a vision encoder; only language models are wrapped",
            hint=f"`{kind}_text` may be the type of its language model",
        )
    return config_class, known[config_class]


def _refuse_unknown(config_class: Any, changes: dict[str, Any]) -> None:
    own = {*config_class().to_dict(), *config_class.attribute_map, *inspect.signature(config_class).parameters}
    for key in changes:
        if key not in own or key in ("model_type", "kwargs"):
            raise ConfigError(
                f"config has the key `{key}`, which a {config_class.__name__} has not{did_you_mean(key, own)}"
            )


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "component model.huggingface needs transformers, which is not installed",
            hint="pip install 'modalities-models[transformers]'",
        ) from error
    if int(transformers.__version__.partition(".")[0]) < EARLIEST:
        raise ConfigError(
            f"component model.huggingface needs transformers {EARLIEST}, this is {transformers.__version__}",
            hint=f"pip install 'transformers>={EARLIEST},<{EARLIEST + 1}'",
        )
    return transformers


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
