"""The component ``loss.cross_entropy``.

Shape suffixes: B batch, T tokens, N = B * T, D hidden size, V vocabulary size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Batch, LossSum
from modalities_models.losses.chunked import chunked
from modalities_models.losses.objective import Objective
from modalities_models.losses.projection import projection, vocabulary_shard

CPU_CHUNK = 512
"""Tokens. On one CPU core chunks of 256 and 512 are the fastest in bfloat16 and float32, with vocabularies of 8,192 and
32,000 alike: milliseconds of 4,096 tokens of 384, 8,192 logits each, bfloat16: 554 in chunks of 128, 490 of 256, 491 of
512, 571 of 1,024, 627 of 2,048, 809 all at once."""
LOGITS_BYTES = 1 << 30
SMALLEST_CHUNK = 1024
"""Tokens; fewer would spend the time of the products on adding up the gradient of the head."""


class CrossEntropy:
    """Cross entropy in nats, each target times its weight, summed; satisfies ``modalities_core.interfaces.Loss``.

    The log-softmax is float32 whatever the precision of the logits, also under autocast (float64 stays float64).
    Targets of weight 0 take no part: not in the value, not in any gradient, not in the count. Where ranks share the
    head by vocabulary (loss parallelism) each takes only the logits of its own rows, and all have the whole value.

    With logits x of a token, target y, lse = log(sum_v exp(x_v)), e = label_smoothing and c = z_loss:

        loss = (1 - e) * (lse - x_y) + e * (lse - mean_v x_v) + c * lse^2

    Training optimises and reports all of it; ``evaluation`` is the plain cross entropy, so that held-out losses and
    perplexities compare across runs.

    Args:
        chunk_tokens: take the head and the loss over this many tokens at a time, so that logits never exist whole;
            gradients are then computed along with the loss. null takes all at once; auto takes 512 on the CPU, and
            elsewhere as many as have a gibibyte of float32 logits but no fewer than 1024, and all at once where the
            head is not known to be a matrix, since it would be called twice.
        label_smoothing: share of each target's probability spread evenly over the vocabulary (arXiv:1512.00567,
            as in PyTorch), in [0, 1).
        z_loss: factor on the square of log(sum(exp(logits))), which keeps it near 0 (PaLM, arXiv:2204.02311, has
            1e-4).

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self, chunk_tokens: int | Literal["auto"] | None = "auto", label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> None:
        if isinstance(chunk_tokens, str) and chunk_tokens != "auto":
            raise ConfigError(
                f"chunk_tokens is a number, auto or null, not {chunk_tokens!r}", about=(self, "chunk_tokens")
            )
        if isinstance(chunk_tokens, int) and chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens must be at least 1, not {chunk_tokens}", about=(self, "chunk_tokens"))
        self.chunk_tokens: int | Literal["auto"] | None = chunk_tokens
        self.objective = objective(self, label_smoothing, z_loss)

    @property
    def evaluation(self) -> CrossEntropy:
        """The plain cross entropy, chunked alike."""
        return self if self.objective == Objective() else CrossEntropy(self.chunk_tokens)

    def __call__(self, hidden_BTD: Tensor, head: nn.Module, batch: Batch) -> LossSum:
        """The summed loss of a micro batch and the sum of its weights.

        Args:
            hidden_BTD: (B, T, D) from the model.
            head: (..., D) to logits (..., V).
            batch: its targets, and weights or None where every target counts 1.
        """
        hidden_ND, targets_N, weights_N, tokens = flattened(hidden_BTD, batch)
        size = automatic_chunk(hidden_ND, head) if self.chunk_tokens == "auto" else self.chunk_tokens
        size = len(targets_N) if size is None else min(size, len(targets_N))
        if size == len(targets_N) and not _shares_vocabulary(head, hidden_ND):
            return LossSum(self.objective.summed(head(hidden_ND), targets_N, weights_N), tokens)
        return LossSum(chunked(hidden_ND, head, targets_N, weights_N, self.objective, size), tokens)


def automatic_chunk(hidden_ND: Tensor, head: nn.Module) -> int | None:
    """The tokens of a chunk for ``chunk_tokens: auto``; None is all at once.

    Args:
        hidden_ND: (N, D).
        head: what turns them into logits.
    """
    known = projection(head, hidden_ND)
    if known is None:
        return None
    if hidden_ND.device.type == "cpu":
        return CPU_CHUNK
    # Of the whole vocabulary also where ranks share it: their parts may differ, and their chunks must not.
    most = max(SMALLEST_CHUNK, LOGITS_BYTES // (4 * known.columns.vocab_size))
    # Chunks of equal size: a small last one would be slow, and a second shape for kernels.
    return -(-len(hidden_ND) // -(-len(hidden_ND) // most)) if len(hidden_ND) > most else most


def _shares_vocabulary(head: nn.Module, hidden_ND: Tensor) -> bool:
    """Whether ranks share a head that is known to be a matrix; one that is not gathers logits when called."""
    return vocabulary_shard(head) is not None and projection(head, hidden_ND) is not None


def objective(component: object, label_smoothing: float, z_loss: float) -> Objective:
    """The objective of these numbers.

    Args:
        component: whose arguments they are, for error positions.
        label_smoothing: in [0, 1).
        z_loss: at least 0.

    Raises:
        ConfigError: one is out of range.
    """
    if not 0 <= label_smoothing < 1:
        message = f"label_smoothing is a share of at least 0 and less than 1, not {label_smoothing}"
        raise ConfigError(message, about=(component, "label_smoothing"))
    if not 0 <= z_loss < float("inf"):
        raise ConfigError(f"z_loss must be at least 0 and finite, not {z_loss}", about=(component, "z_loss"))
    return Objective(label_smoothing, z_loss)


def flattened(hidden_BTD: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Hidden states (N, D), targets (N,), weights (N,) float32 or None, and their sum, a float32 scalar.

    Raises:
        ConfigError: the model gives more than hidden states.
    """
    if isinstance(hidden_BTD, tuple):
        raise ConfigError(
            f"the model gives a {type(hidden_BTD).__name__}, and cross entropy takes hidden states alone",
            hint="train it with the loss that is made for it: loss.coca for model.coca",
        )
    targets_N = batch.targets_BT.flatten()
    if batch.weights_BT is None:
        tokens = torch.full((), len(targets_N), dtype=torch.float32, device=hidden_BTD.device)
        return hidden_BTD.flatten(0, -2), targets_N, None, tokens
    weights_N = batch.weights_BT.flatten().float()
    return hidden_BTD.flatten(0, -2), targets_N, weights_N, weights_N.sum()
