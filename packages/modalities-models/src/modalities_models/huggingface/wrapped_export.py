"""A wrapped model as the folder that its own class writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modalities_core.errors import CheckpointError
from modalities_models.huggingface.settings import read_settings
from modalities_models.huggingface.verifying import SEQUENCES, SMALLEST, Agreement, agreement, their_logits
from modalities_models.huggingface.wrapped_config import Description
from modalities_models.huggingface.wrapped_weights import FolderWeights

LONGEST = 48


def export(
    description: Description,
    folder: Path,
    tensors: Mapping[str, Tensor],
    tied: frozenset[str],
    dtype: torch.dtype | None,
    token_ids: Mapping[str, int | list[int]],
) -> str:
    """Write config.json, generation_config.json and safetensors.

    Args:
        description: class and config.
        folder: exists, and is empty.
        tensors: all parameters and persistent buffers, by the names of the class.
        tied: names of those that are read from others.
        dtype: of the weights; None leaves them.
        token_ids: for both files.

    Returns:
        The name of the class.
    """
    with torch.device("meta"):
        network: Any = description.build()
    cast = {name: value.to(dtype) if dtype and value.is_floating_point() else value for name, value in tensors.items()}
    missing, unexpected = network.load_state_dict(cast, strict=False, assign=True)
    assert set(missing) <= tied and not unexpected, (missing, unexpected)
    network.tie_weights()
    for owner in (network.config, network.generation_config):
        # None also where unknown: a class's own ids belong to another tokenizer.
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(owner, name, token_ids.get(name))
    network.config.dtype = max(cast.values(), key=lambda value: value.nbytes).dtype
    _without_progress_bar()
    network.save_pretrained(folder)
    return description.class_name


def compare(model: nn.Module, folder: Path, tensors: Mapping[str, Tensor]) -> Agreement:
    """Read an export back and compare it with what it was written from.

    Args:
        model: a ``HuggingFaceModel``, on any device; it is on the CPU with what was read back afterwards.
        folder: what was written.
        tensors: what it was written from, by the names of the class.

    Raises:
        CheckpointError: a tensor comes back otherwise, but for rounding, or the logits differ from those that
            transformers computes.
    """
    wrapped: Any = model
    weights = FolderWeights(folder, wrapped.network, wrapped._tied)
    values = read_settings(folder).values
    eps = torch.finfo(getattr(torch, str(values.get("dtype") or values["torch_dtype"]))).eps
    wrapped.to_empty(device="cpu")
    targets = dict(wrapped.named_parameters()) | dict(wrapped.named_buffers())
    with torch.no_grad():
        for name, value in wrapped._construction.values(wrapped.seed, frozenset(tensors)):
            targets[f"network.{name}"].copy_(value)
        for name, value in weights.values():
            _refuse_loss(name, value, tensors[name], eps)
            targets[f"network.{name}"].copy_(value)
    generator = torch.Generator().manual_seed(0)
    shape = (SEQUENCES, min(wrapped.sequence_length, LONGEST))
    tokens_BT = torch.randint(wrapped.vocab_size, shape, generator=generator)
    with torch.no_grad():
        wrapped.eval()
        ours_BTV = wrapped.head(wrapped(tokens_BT)).float()
    return agreement(ours_BTV, their_logits(folder, tokens_BT))


def _refuse_loss(name: str, value: Tensor, original: Tensor, eps: float) -> None:
    """Values may differ by the rounding of the type they are stored in, and by nothing else."""
    lost = ~((value.float() - original.float()).abs() <= eps * original.float().abs() + SMALLEST)
    if lost.any():
        raise CheckpointError(
            f"{name} comes back otherwise than it was written: {value[lost][0]:g} for {original[lost][0]:g}",
            hint="a narrow type may not hold it; --dtype float32 does. If that comes back wrong too, report it",
        )


def _without_progress_bar() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
