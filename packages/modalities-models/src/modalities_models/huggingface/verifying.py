"""Our logits against those of transformers on the same folder."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modalities_core.errors import CheckpointError, ConfigError
from modalities_models.decoder import Decoder

SEQUENCES = 3
LONGEST = 48
TOLERANCE = 1e-4
"""Of the largest logit: in float32 two right implementations of a large model differ by a tenth of it or less."""


class Agreement(NamedTuple):
    """How near two models came.

    difference: the largest between two logits.
    scale: the largest logit.
    tokens: positions compared, all ids each.
    greedy: at how many of them the likeliest token was the same.
    """

    difference: float
    scale: float
    tokens: int
    greedy: int


def sample_tokens(vocab_size: int, longest: int, seed: int = 0) -> Tensor:
    """Token ids (sequences, length) int64, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (SEQUENCES, min(longest, LONGEST)), generator=generator)


@torch.no_grad()
def our_logits(model: Decoder, tokens_BT: Tensor) -> Tensor:
    """(B, T, V) in float32, of a model in whatever precision; it is in evaluation mode afterwards."""
    model.eval()
    return model.head(model(tokens_BT)).float()


@torch.no_grad()
def their_logits(folder: Path, tokens_BT: Tensor) -> Tensor:
    """(B, T, V) in float32, of transformers' own class for ``folder``, in float32; no code of the folder is run.

    Raises:
        ConfigError: transformers is not installed.
        CheckpointError: it does not load the folder.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "verifying needs transformers", hint="pip install 'modalities-models[transformers]', or give --no-verify"
        ) from error
    loader: Any = transformers.AutoModelForCausalLM
    try:
        model, report = loader.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # whatever a library of models makes of a folder it does not like
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"transformers {transformers.__version__} does not load {folder}: {reason}") from error
    if lost := sorted(report["missing_keys"]):
        raise CheckpointError(f"transformers misses {len(lost)} tensors in {folder}, such as {lost[0]}")
    return model.eval()(tokens_BT, use_cache=False).logits.float()


def agreement(ours_BTV: Tensor, theirs_BTV: Tensor) -> Agreement:
    """How near two tensors of logits are.

    Raises:
        CheckpointError: further than rounding in float32 explains.
    """
    if ours_BTV.shape != theirs_BTV.shape:
        shapes = f"{list(ours_BTV.shape)} and {list(theirs_BTV.shape)}"
        raise CheckpointError(f"the logits of Modalities and of transformers have different shapes: {shapes}")
    difference = (ours_BTV - theirs_BTV).abs().max().item()
    scale = theirs_BTV.abs().max().item()
    same = (ours_BTV.argmax(-1) == theirs_BTV.argmax(-1)).sum().item()
    found = Agreement(difference, scale, ours_BTV.shape[:-1].numel(), int(same))
    if not difference <= TOLERANCE * scale:
        raise CheckpointError(
            f"the logits differ from those of transformers by up to {difference:.3g}, the largest being {scale:.3g}; "
            f"at {found.greedy} of {found.tokens} positions the likeliest token is the same",
            hint="nothing was written; this is a bug in the conversion, please report it with the model's config.json",
        )
    return found


def verify(model: Decoder, folder: Path) -> Agreement:
    """Compare a float32 model of ours with what transformers makes of ``folder``, on a few seeded sequences.

    Args:
        model: in float32; it is emptied before the other one is loaded, so that both are never in memory together.
        folder: the exported, or the imported, checkpoint.

    Raises:
        ConfigError: transformers is not installed.
        CheckpointError: it does not load the folder, or the logits differ.
    """
    tokens_BT = sample_tokens(model.vocab_size, model.sequence_length)
    ours = our_logits(model, tokens_BT)
    model.to_empty(device="meta")
    gc.collect()
    return agreement(ours, their_logits(folder, tokens_BT))
