"""A vision transformer (arXiv:2010.11929): images to hidden states.

Parameter names (N counts from 0):
    patch_embedding.projection.{weight (D, C * P * P), bias}; class_embedding (D,) with a class token
    position_embedding (S, D); blocks.N as in decoder.py; norm

Shape suffixes: B batch, C channels, H height, W width, S tokens of an image, P side of a patch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modalities_core.errors import ConfigError
from modalities_models.architecture import Architecture, derived_head_size, derived_intermediate_size, require_positive
from modalities_models.initialization import Initialization, Scaled, initial_value
from modalities_models.nn.attention_implementations import prepare
from modalities_models.nn.block import Block
from modalities_models.nn.feedforward import PlainFeedForward, dense, dense_count
from modalities_models.nn.masks import everything
from modalities_models.nn.norms import norm as make_norm
from modalities_models.nn.patches import PatchEmbedding
from modalities_models.parts import FeedForwardCount, FeedForwardShape
from modalities_models.roles import fill, matmul_parameters, roles


@dataclass(frozen=True, slots=True)
class ExactGELU:
    """A feed-forward down(gelu(up(x))) with GELU in its own form, by the error function (arXiv:1606.08415)."""

    def build(self, shape: FeedForwardShape, layer: int) -> nn.Module:
        """The module of a block: (B, S, D) to (B, S, D)."""
        made = dense(shape)
        assert isinstance(made, PlainFeedForward)
        made.nonlinearity = F.gelu
        return made

    def count(self, shape: FeedForwardShape, layer: int) -> FeedForwardCount:
        """Those of the dense one."""
        return dense_count(shape)

    def check(self, layers: int) -> None:
        """It fits any number of blocks."""


class VisionTransformer(nn.Module):
    """An encoder of images in which all patches see each other; a part of models such as ``model.coca``.

    Built like the decoder: without storage inside ``torch.device("meta")``, anywhere else filled from
    ``initial_values``. With the defaults and the sizes of ViT-B/16 it is that model, weight for weight.

    Args:
        image_size: height and width in pixels, or one number for both.
        patch_size: side of a patch; divides both.
        hidden_size: width of the residual stream.
        layers: number of blocks.
        heads: per block.
        channels: of the images.
        intermediate_size: inner width of the feed-forward; default 4 * hidden_size, 8/3 of it for swiglu.
        pooling: how ``pooled`` sums an image up: by a ``class_token`` in front of the patches, or by the ``mean`` of
            the patches, and then there is no such token.
        activation: of the feed-forward; gelu_exact is that of the paper, gelu its tanh form, swiglu has a gate.
        norm: LayerNorm or RMSNorm.
        norm_eps: added to the variance in every norm.
        bias: biases in projections and LayerNorms.
        dropout: probability, on embeddings, attention weights and residual outputs, in training only.
        initialization: how weights are filled; default ``initialization.scaled`` with std 0.02.
        seed: of the initial values.

    Raises:
        ConfigError: the numbers are impossible.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        patch_size: int,
        hidden_size: int,
        layers: int,
        heads: int,
        channels: int = 3,
        intermediate_size: int | None = None,
        pooling: Literal["class_token", "mean"] = "class_token",
        activation: Literal["gelu_exact", "gelu", "swiglu"] = "gelu_exact",
        norm: Literal["layer", "rms"] = "layer",
        norm_eps: float = 1e-6,
        bias: bool = True,
        dropout: float = 0.0,
        initialization: Initialization | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        for name, value in {"image_size": min(height, width), "patch_size": patch_size, "channels": channels}.items():
            require_positive(name, value)
        if height % patch_size or width % patch_size:
            raise ConfigError(
                f"patch_size {patch_size} does not divide the image size {height} x {width}", about=(self, "patch_size")
            )
        if pooling not in ("class_token", "mean"):
            raise ConfigError(f"pooling is class_token or mean, not {pooling!r}", about=(self, "pooling"))
        has_class_token = pooling == "class_token"
        self.image_shape = (height, width, channels)
        self.pooling = pooling
        self.hidden_size = hidden_size
        self.tokens = (height // patch_size) * (width // patch_size) + has_class_token
        self.initialization = initialization or Scaled()
        self.seed = seed
        feedforward = "gelu" if activation == "gelu_exact" else activation
        self.architecture = a = Architecture(
            vocab_size=1,  # it reads no tokens
            sequence_length=self.tokens,
            hidden_size=hidden_size,
            layers=layers,
            heads=heads,
            key_value_heads=heads,
            head_size=derived_head_size(hidden_size, heads),
            intermediate_size=intermediate_size or derived_intermediate_size(hidden_size, feedforward),
            norm=norm,
            norm_eps=norm_eps,
            activation=feedforward,
            feedforward=ExactGELU() if activation == "gelu_exact" else None,
            positions="none",
            bias=bias,
            dropout=dropout,
        )
        device = torch.get_default_device()
        with torch.device("meta"):
            self.patch_embedding = PatchEmbedding(channels, patch_size, hidden_size)
            self.class_embedding = nn.Parameter(torch.empty(hidden_size)) if has_class_token else None
            self.position_embedding = nn.Parameter(torch.empty(self.tokens, hidden_size))
            self.blocks = nn.ModuleList([Block(a, layer) for layer in range(layers)])
            self.norm = make_norm(norm, hidden_size, norm_eps, bias)
        self._roles = roles(self)
        if device.type != "meta":
            self.to_empty(device=device)
            for name, value in self.initial_values():
                fill(self, name, value)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Images (B, C, H, W) to hidden states (B, S, D) after the final norm, the class token, if any, first.

        Args:
            images_BCHW: uint8, which become [-1, 1], or floats, taken as they are.

        Raises:
            ConfigError: the images have another size.
        """
        height, width, channels = self.image_shape
        if images_BCHW.shape[1:] != (channels, height, width):
            found = " x ".join(map(str, images_BCHW.shape[1:]))
            raise ConfigError(
                f"the images are {found} (channels, height, width), the model takes {channels} x {height} x {width}",
                about=(self, "image_size"),
            )
        hidden_BSD = self.patch_embedding(images_BCHW)
        if self.class_embedding is not None:
            class_B1D = self.class_embedding.to(hidden_BSD.dtype).expand(hidden_BSD.shape[0], 1, -1)
            hidden_BSD = torch.cat((class_B1D, hidden_BSD), 1)
        hidden_BSD = hidden_BSD + self.position_embedding
        if self.architecture.dropout and self.training:
            hidden_BSD = F.dropout(hidden_BSD, self.architecture.dropout)
        mask = everything()
        prepare(mask, self.architecture, hidden_BSD, self)
        for block in self.blocks:
            hidden_BSD = block(hidden_BSD, None, mask)
        return self.norm(hidden_BSD)

    def pooled(self, hidden_BSD: Tensor) -> Tensor:
        """Hidden states (B, S, D) to one vector per image, (B, D)."""
        return hidden_BSD[:, 0] if self.class_embedding is not None else hidden_BSD.mean(1)

    def initial_values(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's name and whole initial value, float32 on the CPU; the same on every rank."""
        for name, (shape, role) in self._roles.items():
            yield name, initial_value(name, shape, role, self.initialization, self.seed)

    def flops_per_image(self) -> float:
        """Training FLOPs per image, forward and backward (PaLM convention, arXiv:2204.02311 appendix B)."""
        a = self.architecture
        attention = 12 * a.layers * a.heads * a.head_size * self.tokens
        return float(self.tokens * (6 * matmul_parameters(self) + attention))
