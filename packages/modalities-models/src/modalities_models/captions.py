"""Descriptions of images by a trained contrastive captioner, and how well it matches images and texts.

Shape suffixes: B images, N pairs, E embedding size; C, H, W channels, height and width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from modalities_core.errors import ConfigError
from modalities_models.coca import CoCa


@torch.no_grad()
def generate_captions(
    model: CoCa, images_BCHW: Tensor, end_of_document: int, max_new_tokens: int | None = None
) -> list[list[int]]:
    """Describe images by the likeliest next token, over and over, all images at once; in evaluation mode.

    Args:
        model: trained, and not sharded.
        images_BCHW: (B, C, H, W), as in training, on the model's device.
        end_of_document: id of the token that begins and ends a caption.
        max_new_tokens: the most tokens of a caption; by default as many as the model takes.

    Returns:
        For each image the tokens of its caption, without those at the ends.

    Raises:
        ConfigError: the images have another size, or more tokens are asked for than the model takes.
    """
    wanted = model.sequence_length if max_new_tokens is None else max_new_tokens
    if not 1 <= wanted <= model.sequence_length:
        raise ConfigError(f"the model writes 1 to {model.sequence_length} tokens, not {wanted}")
    training = model.training
    model.eval()
    try:
        seen_BQD, _ = model.encode_images(images_BCHW)
        caches = model.caption_caches()
        latest_B1 = torch.full((images_BCHW.shape[0], 1), end_of_document, device=images_BCHW.device)
        written: list[Tensor] = []
        ended_B1 = torch.zeros_like(latest_B1, dtype=torch.bool)
        while len(written) < wanted and not ended_B1.all():
            hidden_B1D = model.decode(latest_B1, seen_BQD, caches)
            latest_B1 = model.head(hidden_B1D).argmax(-1)
            written.append(latest_B1)
            ended_B1 |= latest_B1 == end_of_document
    finally:
        model.train(training)
    rows = torch.cat(written, 1).tolist() if written else [[] for _ in images_BCHW]
    return [row[: row.index(end_of_document)] if end_of_document in row else row for row in rows]


class Retrieval(NamedTuple):
    """How often the counterpart is found among N pairs, as a share of them; chance is k / N.

    text_of_image: the text of an image is among the k most similar texts.
    image_of_text: the image of a text is among the k most similar images.
    """

    text_of_image: float
    image_of_text: float


def recall(images_NE: Tensor, texts_NE: Tensor, k: int = 1) -> Retrieval:
    """Recall at k in both directions.

    Where others are exactly as similar as the counterpart, they are taken to come first.

    Args:
        images_NE: (N, E) of length 1.
        texts_NE: (N, E) of length 1, each the counterpart of the image in its row.
        k: how many are looked at, from 1.
    """
    similarity_NN = images_NE.float() @ texts_NE.float().T
    own_N = similarity_NN.diagonal()
    before_image_N = (similarity_NN >= own_N[:, None]).sum(1) - 1
    before_text_N = (similarity_NN >= own_N[None, :]).sum(0) - 1
    return Retrieval((before_image_N < k).float().mean().item(), (before_text_N < k).float().mean().item())
