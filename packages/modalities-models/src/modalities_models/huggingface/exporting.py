"""A decoder as a folder of Hugging Face's: config.json, generation_config.json and safetensors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modalities_core.errors import CheckpointError, ConfigError
from modalities_core.files import sync_folder
from modalities_models.architecture import Architecture
from modalities_models.huggingface.families import family_named, family_of
from modalities_models.huggingface.family import Family, shapes_of
from modalities_models.huggingface.files import TensorInfo, write
from modalities_models.huggingface.links import Link

TRANSFORMERS = "4.57.0"
"""The earliest version that every family and key we write has been in."""


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary neighbour that becomes ``folder`` on success and vanishes on failure.

    Raises:
        ConfigError: there is something at ``folder`` already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists already", hint="name a folder that does not, or remove it first")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync_folder(temporary)
        if folder.is_dir():
            folder.rmdir()
        os.replace(temporary, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def export(
    folder: Path,
    architecture: Architecture,
    read: Callable[[str], Tensor],
    *,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    stored: Callable[[str], torch.dtype] | None = None,
    token_ids: Mapping[str, int | list[int]] | None = None,
) -> Family:
    """Write a decoder into an existing, empty folder, holding one tensor (or one layer's experts) at a time.

    Args:
        folder: where to; see :func:`new_folder`.
        architecture: the decoder's.
        read: gives the whole tensor of one of our names.
        family: its ``model_type``; by default the first that can express the decoder.
        dtype: of the weights written; by default their own.
        stored: gives the type of one of our names; without it, one more read does.
        token_ids: such as ``eos_token_id``, for config.json and generation_config.json.

    Returns:
        The family it was written as.

    Raises:
        ConfigError: no family, or not the one named, can express the decoder.
        CheckpointError: a tensor has not the shape that the architecture means.
        ResourceError: the disk is full.
    """
    chosen = family_of(architecture) if family is None else family_named(family, architecture)
    shapes = shapes_of(architecture)
    links = chosen.links(architecture, shapes)
    own = stored or (lambda name: read(name).dtype)
    kinds = {link.ours[0]: _dtype(link.ours[0], own, dtype) for link in links}
    plan, ordered = [], []
    # The widest first, so that every tensor of the file begins where its type may.
    for link in sorted(links, key=lambda link: -kinds[link.ours[0]].itemsize):
        plan += _planned(link, shapes, kinds[link.ours[0]])
        ordered.append(link)
    write(folder, plan, _converted(ordered, shapes, read, kinds))
    ids = dict(token_ids or {})
    most_common = max(plan, key=lambda info: info.bytes).dtype
    _write_json(folder / "config.json", settings(chosen, architecture, most_common, ids))
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
    return chosen


def settings(family: Family, architecture: Architecture, dtype: torch.dtype, token_ids: Mapping[str, Any]) -> dict:
    """The content of config.json."""
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        **family.write(architecture),
        # None also where unknown: a class's own ids belong to another tokenizer.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        **token_ids,
        "use_cache": True,
        "torch_dtype": name,
        "transformers_version": TRANSFORMERS,
    }


def _dtype(name: str, own: Callable[[str], torch.dtype], wanted: torch.dtype | None) -> torch.dtype:
    """Of a tensor written: biases of the choice of experts stay in float32 or wider beside weights of any type."""
    if name.endswith(".balance"):
        return torch.promote_types(torch.float32, own(name))
    return wanted or own(name)


def _planned(link: Link, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> list[TensorInfo]:
    """What comes of one link, found out without any data."""
    examples = link.to_theirs([torch.empty(shapes[name], device="meta") for name in link.ours])
    return [TensorInfo(name, tuple(it.shape), dtype) for name, it in zip(link.theirs, examples, strict=True)]


def _converted(
    links: list[Link],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    dtypes: Mapping[str, torch.dtype],
) -> Iterator[Tensor]:
    for link in links:
        ours = []
        for name in link.ours:
            ours.append(read(name).detach().cpu())
            if tuple(ours[-1].shape) != shapes[name]:
                raise CheckpointError(f"{name} has the shape {tuple(ours[-1].shape)}, its model means {shapes[name]}")
        for tensor in link.to_theirs(ours):
            yield tensor.to(dtypes[link.ours[0]])


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
