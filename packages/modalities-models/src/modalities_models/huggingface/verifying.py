"""Our logits against those of transformers on the same folder."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modalities_core.errors import CheckpointError, ConfigError, first_line
from modalities_models.architecture import Architecture
from modalities_models.decoder import Decoder
from modalities_models.huggingface.family import shapes_of
from modalities_models.huggingface.links import OneLess
from modalities_models.huggingface.loading import Checkpoint
from modalities_models.initialization import Scaled

SEQUENCES = 3
LONGEST = 48
SMALLEST = 1e-7
"""Numbers below this are nothing to float16."""
LARGE_WINDOW = 512
"""Windows up to this are tried out; reading more tokens takes longer than a larger one is worth."""
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


def sample_tokens(vocab_size: int, length: int, seed: int = 0) -> Tensor:
    """Token ids (sequences, length) int64, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (SEQUENCES, length), generator=generator)


def telling_length(architecture: Architecture) -> int:
    """How many tokens tell one decoder from another: more than a window that is not large."""
    windows = [window for window in architecture.attention_windows if window is not None and window <= LARGE_WINDOW]
    return min(architecture.sequence_length, max([LONGEST, *(window + 16 for window in windows)]))


def exported_decoder(folder: Path, architecture: Architecture, read: Callable[[str], Tensor]) -> Decoder:
    """The decoder in an exported folder, in float32, once it is certain that nothing was lost on the way there.

    Args:
        folder: what was written.
        architecture: of the decoder that was exported.
        read: gives the whole tensor of one of our names, as it was before.

    Raises:
        CheckpointError: a tensor comes back otherwise than it was, but for rounding to the type it is stored in.
    """
    found = Checkpoint(folder)
    with torch.device("meta"):
        model = Decoder(architecture, Scaled())
    eps = torch.finfo(torch_dtype(found)).eps
    from_one = {link.our for link in found.family.links(architecture, shapes_of(architecture)) if type(link) is OneLess}
    tensors = {}
    for name, value in found.tensors(architecture, torch.float32):
        original = read(name).float()
        allowed = eps * (original.abs() + (original - 1).abs() if name in from_one else original.abs())
        lost = ~((value - original).abs() <= allowed + SMALLEST)
        if lost.any():
            raise CheckpointError(
                f"{name} comes back otherwise than it was written: {value[lost][0]:g} for {original[lost][0]:g}",
                hint="a narrow type may not hold it; --dtype float32 does. If that comes back wrong too, report it",
            )
        tensors[name] = value
    model.load_state_dict(tensors, assign=True)
    return model


def torch_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What config.json says that most weights are stored in."""
    name = checkpoint.settings.values.get("torch_dtype") or checkpoint.settings.values.get("dtype") or "float32"
    return getattr(torch, str(name))


@torch.no_grad()
def our_logits(model: Any, tokens_BT: Tensor) -> Tensor:
    """(B, T, V) in float32, of a Model in whatever precision; it is in evaluation mode afterwards."""
    model.eval()
    return model.head(model(tokens_BT)).float()


def require_transformers() -> Any:
    """The library, where there is one.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "comparing the logits needs transformers, which is not installed",
            hint="pip install 'modalities-models[transformers]', or go without by --no-verify",
        ) from error
    return transformers


@torch.no_grad()
def their_logits(folder: Path, tokens_BT: Tensor) -> Tensor:
    """(B, T, V) in float32, of transformers' own class for ``folder``, in float32; no code of the folder is run.

    Raises:
        ConfigError: transformers is not installed.
        CheckpointError: it does not load the folder.
    """
    transformers = require_transformers()
    transformers.utils.logging.disable_progress_bar()
    loader = transformers.AutoModelForCausalLM
    try:
        model, report = loader.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",  # the one that does all that a class defines, soft caps included
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a library of models makes of a folder it does not like
        reason = first_line(error)
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
    tokens_BT = sample_tokens(model.vocab_size, telling_length(model.architecture))
    ours = our_logits(model, tokens_BT)
    model.to_empty(device="meta")
    gc.collect()
    return agreement(ours, their_logits(folder, tokens_BT))
