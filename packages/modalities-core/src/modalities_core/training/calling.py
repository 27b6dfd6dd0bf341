"""What of a batch a model is given."""

from __future__ import annotations

import inspect
from typing import Any

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Batch, Model
from modalities_core.training.parameters import as_module


def call(model: Model, batch: Batch) -> Any:
    """The model's output on a batch: its tokens, and by keyword whatever else the batch has.

    Raises:
        ConfigError: the model's forward takes no argument for something that the batch has.
    """
    optional = {"segments_BT": batch.segments_BT, "images_BCHW": batch.images_BCHW}
    given = {name: value for name, value in optional.items() if value is not None}
    module = as_module(model)
    if given:
        taken = inspect.signature(module.forward).parameters
        for name in given:
            if name not in taken:
                raise _refused(model, name)
    return module(batch.tokens_BT, **given)


def _refused(model: Model, name: str) -> ConfigError:
    kind = type(model).__name__
    if name == "images_BCHW":
        return ConfigError(
            f"the data has images, but {kind} does not look at them",
            hint="take a dataset of text, or give the model's forward the argument images_BCHW",
            about=model,
        )
    return ConfigError(
        f"the data marks where documents begin, but {kind} cannot keep them apart",
        hint="let the dataset join documents, or give the model's forward the argument segments_BT",
        about=model,
    )
