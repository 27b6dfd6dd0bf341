"""What of a batch a model is given."""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from typing import Any

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Batch, Model
from modalities_core.training.parameters import as_module

_for_loss: ContextVar[bool] = ContextVar("a batch is being given to a model", default=False)


def is_for_loss() -> bool:
    """Whether a model is being called by ``call``, for a loss; if not, for whoever wants to know of all tokens.

    Where ranks share the tokens of a sample, the loss on each of them takes its own.
    """
    return _for_loss.get()


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
    token = _for_loss.set(True)
    try:
        return module(batch.tokens_BT, **given)
    finally:
        _for_loss.reset(token)


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
