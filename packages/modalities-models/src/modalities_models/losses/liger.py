"""The component ``loss.liger_cross_entropy``: head and loss fused in Triton, from the package liger-kernel.

Shape suffixes: B batch, T tokens, N = B * T, D hidden size, V vocabulary size.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Batch, LossSum
from modalities_models.losses.cross_entropy import flattened, objective
from modalities_models.losses.objective import NO_IGNORED_ID, Objective
from modalities_models.losses.projection import projection, vocabulary_shard

OLDEST = (0, 8, 2)
"""Earlier versions leave the weights of single tokens out of the gradient of the head."""
INSTALL = 'pip install "modalities-models[liger]"'


class LigerCrossEntropy:
    """The same sum as ``loss.cross_entropy``, by Liger Kernel (arXiv:2410.10989): logits never exist whole.

    For GPUs, with heads that are a matrix, a factor and a soft cap, which are those of model.decoder and a plain
    ``nn.Linear``. Gradients come with the loss where every weight is 0 or 1; fractional weights cost a second pass
    over the vocabulary. Each call waits for the device once or twice, which the kernel itself needs.

    Args:
        label_smoothing: share of each target's probability spread evenly over the vocabulary (arXiv:1512.00567,
            as in PyTorch), in [0, 1).
        z_loss: factor on the square of log(sum(exp(logits))) (PaLM, arXiv:2204.02311).

    Raises:
        ConfigError: liger-kernel is not installed or too old, or an argument is out of range.
    """

    def __init__(self, label_smoothing: float = 0.0, z_loss: float = 0.0) -> None:
        self.objective = objective(self, label_smoothing, z_loss)
        _require()

    @property
    def evaluation(self) -> LigerCrossEntropy:
        """The plain cross entropy."""
        return self if self.objective == Objective() else LigerCrossEntropy()

    def __call__(self, hidden_BTD: Tensor, head: nn.Module, batch: Batch) -> LossSum:
        """The summed loss of a micro batch and the sum of its weights.

        Args:
            hidden_BTD: (B, T, D) from the model, on a GPU.
            head: (..., D) to logits (..., V).
            batch: its targets in [0, V), and weights or None where every target counts 1.

        Raises:
            ConfigError: the tensors are not on a GPU, ranks share the head by vocabulary, or it does more than the
                kernel can.
            IndexError: a target is outside the vocabulary.
        """
        if vocabulary_shard(head) is not None:
            raise ConfigError(
                "loss.liger_cross_entropy needs the whole head on every rank, but tensor parallelism splits it by "
                "vocabulary",
                hint="use loss.cross_entropy, which computes the same from parts; or set world.auto's tp to 1",
                about=self,
            )
        if hidden_BTD.device.type != "cuda":
            raise ConfigError(
                f"loss.liger_cross_entropy runs on GPUs only, its kernels are Triton; this run is on "
                f"{hidden_BTD.device.type}",
                hint="use loss.cross_entropy with chunk_tokens, which computes the same anywhere",
                about=self,
            )
        hidden_ND, targets_N, weights_N, tokens = flattened(hidden_BTD, batch)
        known = projection(head, hidden_ND)
        if known is None:
            raise ConfigError(
                f"loss.liger_cross_entropy computes the head itself, but does not know what {type(head).__name__} does",
                hint="use loss.cross_entropy, which calls the head",
                about=self,
            )
        weight_VD, vocab_size = known.matrix_VD, known.columns.vocab_size
        hidden_ND = hidden_ND.to(known.dtype) * known.multiplier
        if torch.is_grad_enabled() and not hidden_ND.requires_grad:
            # Without a gradient for its input the kernel would leave out that of the head too.
            hidden_ND = hidden_ND.detach().requires_grad_()
        masked = _masks(targets_N, weights_N, vocab_size)
        if masked and weights_N is not None:
            targets_N, weights_N = torch.where(weights_N == 0, NO_IGNORED_ID, targets_N), None
        losses = self._kernel("sum" if weights_N is None else "none", known.softcap)(weight_VD, hidden_ND, targets_N)
        return LossSum(losses if weights_N is None else torch.dot(losses, weights_N), tokens)

    def _kernel(self, reduction: str, softcap: float | None) -> nn.Module:
        from liger_kernel.transformers import (  # pyrefly: ignore[missing-import]
            LigerFusedLinearCrossEntropyLoss,
        )

        return LigerFusedLinearCrossEntropyLoss(
            ignore_index=NO_IGNORED_ID,
            lse_square_scale=self.objective.z_loss,
            label_smoothing=self.objective.label_smoothing,
            reduction=reduction,
            softcap=softcap,
            accum_dtype=torch.float32,
        )


def _masks(targets_N: Tensor, weights_N: Tensor | None, vocab_size: int) -> bool:
    """Whether every weight is 0 or 1; the kernel itself would read past the logits for a wrong target."""
    wrong = ((targets_N < 0) | (targets_N >= vocab_size)).any()
    ones = torch.ones_like(wrong) if weights_N is None else ((weights_N == 0) | (weights_N == 1)).all()
    out_of_bounds, masks = torch.stack([wrong, ones]).tolist()
    if out_of_bounds:
        raise IndexError(f"a target is out of bounds: ids have to be at least 0 and less than {vocab_size}")
    return masks


def _require() -> None:
    """Raise ConfigError unless a liger-kernel that is new enough is installed."""
    try:
        found = version("liger-kernel")
    except PackageNotFoundError:
        raise ConfigError("loss.liger_cross_entropy needs the package liger-kernel", hint=INSTALL) from None
    numbers = tuple(int(part) for part in found.split(".")[:3] if part.isdecimal())
    if numbers < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise ConfigError(f"loss.liger_cross_entropy needs liger-kernel {wanted} or newer, not {found}", hint=INSTALL)
