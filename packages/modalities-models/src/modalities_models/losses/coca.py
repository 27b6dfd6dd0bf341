"""The loss of a contrastive captioner.

Shape suffixes: B captions of this rank's micro batch, M captions of all ranks' micro batches, T tokens,
E embedding size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Batch, Loss, LossSum, World
from modalities_models.coca import CoCaOutput
from modalities_models.losses.cross_entropy import CrossEntropy
from modalities_models.losses.projection import vocabulary_shard


class CoCaLoss:
    """Captioning and comparison (arXiv:2205.01917, equations 2 to 4), as one sum over the captions' tokens.

    Captioning is the cross entropy of the captions' tokens. Comparison is the mean of two cross entropies: which of
    the texts belongs to an image, and which of the images to a text (symmetric InfoNCE, arXiv:2103.00020). Every
    caption counts in it with the weight of its tokens, so that both parts are means over tokens once the sum is
    divided, whatever the ranks.

    What an image is compared with are the texts of one micro batch on all data-parallel ranks, so this part depends on
    how large these are: two ranks with micro batches of 32 compute what one does with 64, while accumulating over two
    of 32 is another, easier task. Captions without any weight, as in the last held-out batch, are nobody's
    counterpart. Two captions in a micro batch that say the same are still told to differ.

    Held-out data is judged by the whole as well, so the perplexity shown beside it is not that of the captions alone.

    Args:
        world: the ranks whose captions are compared with each other.
        captioning: the loss of the captions' tokens; default ``loss.cross_entropy``.
        captioning_weight: factor on captioning.
        contrastive_weight: factor on comparison.

    Raises:
        ConfigError: a weight is negative.
    """

    def __init__(
        self,
        world: World,
        captioning: Loss | None = None,
        captioning_weight: float = 2.0,
        contrastive_weight: float = 1.0,
    ) -> None:
        for name, value in {"captioning_weight": captioning_weight, "contrastive_weight": contrastive_weight}.items():
            if not value >= 0:
                raise ConfigError(f"{name} has to be zero or more, not {value}", about=(self, name))
        self.world = world
        self.captioning: Loss = captioning or CrossEntropy()
        self.captioning_weight = captioning_weight
        self.contrastive_weight = contrastive_weight

    @property
    def evaluation(self) -> CoCaLoss:
        """The same with what its captioning loss is judged by in place of that."""
        judged: Loss = getattr(self.captioning, "evaluation", self.captioning)
        if judged is self.captioning:
            return self
        return CoCaLoss(self.world, judged, self.captioning_weight, self.contrastive_weight)

    def __call__(self, hidden_BTD: Tensor | CoCaOutput, head: nn.Module, batch: Batch) -> LossSum:
        """The summed loss of a micro batch and the sum of its weights; collective.

        Args:
            hidden_BTD: what ``model.coca`` returned.
            head: (..., D) to logits (..., V).
            batch: its targets, and weights or None where every target counts 1.

        Raises:
            ConfigError: the model is none of this kind, or ranks share its head by vocabulary.
        """
        output = hidden_BTD
        if not isinstance(output, CoCaOutput):
            raise ConfigError("loss.coca compares images and texts, which only model.coca gives", about=self)
        if vocabulary_shard(head) is not None:
            raise ConfigError(
                "loss.coca compares whole embeddings, whose gradients tensor parallelism would count once per rank",
                hint="set world.auto's tp to 1",
                about=self,
            )
        caption = self.captioning(output.hidden_BTD, head, batch)
        if batch.weights_BT is None:
            tokens_B = torch.full_like(output.images_BE[:, 0], batch.targets_BT.shape[1], dtype=torch.float32)
        else:
            tokens_B = batch.weights_BT.float().sum(1)
        contrastive = contrastive_loss(output.images_BE, output.texts_BE, output.scale, tokens_B, self.world)
        total = self.captioning_weight * caption.loss + self.contrastive_weight * contrastive
        return LossSum(total, caption.tokens)


def contrastive_loss(images_BE: Tensor, texts_BE: Tensor, scale: Tensor, weights_B: Tensor, world: World) -> Tensor:
    """Weighted sum over this rank's pairs of how hard each is to find among those of all ranks, in nats; collective.

    Added up over the data-parallel ranks, the values and the gradients are those of one process with all pairs.

    Args:
        images_BE: (B, E) of length 1; the same B on every rank.
        texts_BE: (B, E) of length 1, each the counterpart of the image in its row.
        scale: one element, factor on the products.
        weights_B: (B,) float32, of the pairs; those of weight 0 are left out as counterparts of others.
        world: the ranks.

    Returns:
        A scalar, float32 unless the embeddings are float64.
    """
    dtype = images_BE.dtype if images_BE.dtype == torch.float64 else torch.float32
    images_BE, texts_BE, scale = images_BE.to(dtype), texts_BE.to(dtype), scale.to(dtype)
    every_image_ME = _of_all_ranks(images_BE, world).flatten(0, 1)
    every_text_ME = _of_all_ranks(texts_BE, world).flatten(0, 1)
    counts_M = _of_all_ranks(weights_B, world).flatten() > 0
    pairs = images_BE.shape[0]
    own_B = world.data_rank * pairs + torch.arange(pairs, device=images_BE.device)
    # A pair without weight still finds itself, so that no row is empty.
    hidden_BM = ~counts_M & (torch.arange(counts_M.numel(), device=own_B.device) != own_B[:, None])
    with torch.autocast(images_BE.device.type, enabled=False):
        found_text_BM = (scale * images_BE @ every_text_ME.T).masked_fill(hidden_BM, float("-inf"))
        found_image_BM = (scale * texts_BE @ every_image_ME.T).masked_fill(hidden_BM, float("-inf"))
        losses_B = F.cross_entropy(found_text_BM, own_B, reduction="none")
        losses_B = (losses_B + F.cross_entropy(found_image_BM, own_B, reduction="none")) / 2
        return torch.dot(losses_B, weights_B.to(losses_B.dtype))


def _of_all_ranks(values: Tensor, world: World) -> Tensor:
    """(data-parallel ranks, *shape of values): those of every rank, with gradients to the rank they come from."""
    gathered: Any = _Gathered.apply(values, world)
    return gathered


class _Gathered(torch.autograd.Function):
    """Values of all data-parallel ranks on each; backward, the gradients of all ranks for this one's."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, world: World) -> Tensor:
        ctx.world = world
        whole = values.new_zeros(world.data_size, *values.shape)
        # Ranks that see the same data add up the same values.
        whole[world.data_rank] = values * (world.data_size / world.size)
        return world.sum(whole)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        world: World = ctx.world
        whole = world.sum(gradients[0].clone(memory_format=torch.contiguous_format))
        return whole[world.data_rank] * (world.data_size / world.size), None
