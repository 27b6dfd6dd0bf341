"""CoCa, the contrastive captioner (arXiv:2205.01917): one model that compares images with texts and describes images.

An encoder reads the image. A pooler with learned queries turns its tokens into a few for captioning and one vector for
comparison. The lower half of a decoder reads the caption alone; a class token at its end becomes the vector of the
text. The upper half sees the image's tokens too and predicts the next token of the caption.

Parameter names (N counts from 0):
    vision.* as in vision.py
    image_pooling.{query_embedding (Q + 1, D), attention.{query,key,value,output}, norm}; image_projection.weight (E, D)
    embedding.weight (V, D); position_embedding (longest T, D); class_embedding (D,)
    text_blocks.N as in decoder.py; text_norm; text_projection.weight (E, D); log_scale (1,)
    blocks.N.{attention_norm, attention.*, cross_attention_norm, cross_attention.*, feedforward_norm, feedforward.*}
    norm; head.weight (V, D)

Shape suffixes: B batch, T tokens, S tokens of an image, Q queries for captioning, D hidden size, E embedding size,
V vocabulary size; C, H, W channels, height and width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modalities_core.errors import ConfigError
from modalities_core.interfaces import ParallelPlan
from modalities_models.architecture import Architecture, derived_head_size, derived_intermediate_size, require_positive
from modalities_models.head import LinearHead
from modalities_models.initialization import Initialization, Scaled, initial_value
from modalities_models.nn.attention_implementations import prepare
from modalities_models.nn.block import Block
from modalities_models.nn.caches import KeyValueCache
from modalities_models.nn.cross_attention import AttentionPooling, CrossAttention, CrossBlock
from modalities_models.nn.masks import causal
from modalities_models.nn.norms import norm as make_norm
from modalities_models.roles import fill, matmul_parameters, roles
from modalities_models.vision import VisionTransformer

LARGEST_SCALE = 100.0
"""The scale of similarities is kept from growing beyond this, as in CLIP (arXiv:2103.00020, section 2.5)."""


class CoCaOutput(NamedTuple):
    """What one forward pass gives to the loss.

    hidden_BTD: hidden states of the caption's tokens, for the head.
    images_BE: one vector per image, of length 1.
    texts_BE: one vector per caption, of length 1.
    scale: (1,) factor on the products of the two, the inverse of the temperature.
    """

    hidden_BTD: Tensor
    images_BE: Tensor
    texts_BE: Tensor
    scale: Tensor


class CoCa(nn.Module):
    """A contrastive captioner; satisfies ``modalities_core.interfaces.Model`` and is trained with ``loss.coca``.

    Args:
        vision: encodes the images.
        vocab_size: number of token ids.
        sequence_length: longest caption in tokens.
        hidden_size: width of the text decoder's residual stream and of the pooled image.
        text_layers: blocks that read the caption alone.
        multimodal_layers: blocks above them that look at the image too.
        heads: per block, and of the pooling.
        embedding_size: width of the vectors in which images and texts are compared.
        queries: tokens an image is pooled to for captioning.
        intermediate_size: inner width of the feed-forward; default 4 * hidden_size, 8/3 of it for swiglu.
        activation: of the text decoder's feed-forward; gelu is its tanh form.
        norm: LayerNorm or RMSNorm.
        norm_eps: added to the variance in every norm.
        bias: biases in projections and LayerNorms; the head never has one.
        dropout: probability, on embeddings, attention weights and residual outputs, in training only.
        temperature: of the comparison at the start; learned.
        initialization: how weights are filled, except those of ``vision``, which knows its own; default
            ``initialization.scaled`` with std 0.02.
        seed: of the initial values.

    Raises:
        ConfigError: the numbers are impossible.
    """

    def __init__(
        self,
        vision: VisionTransformer,
        vocab_size: int,
        sequence_length: int,
        hidden_size: int,
        text_layers: int,
        multimodal_layers: int,
        heads: int,
        embedding_size: int = 512,
        queries: int = 256,
        intermediate_size: int | None = None,
        activation: Literal["gelu", "swiglu"] = "gelu",
        norm: Literal["layer", "rms"] = "layer",
        norm_eps: float = 1e-5,
        bias: bool = True,
        dropout: float = 0.0,
        temperature: float = 0.07,
        initialization: Initialization | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in {"text_layers": text_layers, "multimodal_layers": multimodal_layers, "queries": queries,
                            "embedding_size": embedding_size, "temperature": temperature}.items():  # fmt: skip
            require_positive(name, value)
        self.architecture = a = Architecture(
            vocab_size=vocab_size,
            sequence_length=sequence_length + 1,  # the class token
            hidden_size=hidden_size,
            layers=text_layers + multimodal_layers,
            heads=heads,
            key_value_heads=heads,
            head_size=derived_head_size(hidden_size, heads),
            intermediate_size=intermediate_size or derived_intermediate_size(hidden_size, activation),
            norm=norm,
            norm_eps=norm_eps,
            activation=activation,
            positions="absolute",
            bias=bias,
            attention="sdpa",  # the class token sees its caption across the padding, which needs a mask of its own
            dropout=dropout,
        )
        self.vocab_size, self.sequence_length = vocab_size, sequence_length
        self.image_shape = vision.image_shape
        self.temperature = temperature
        self.initialization = initialization or Scaled()
        self.seed = seed
        device = torch.get_default_device()
        self.vision = vision
        with torch.device("meta"):
            self.image_pooling = AttentionPooling(queries + 1, a, vision.hidden_size)
            self.image_projection = nn.Linear(hidden_size, embedding_size, bias=False)
            self.embedding = nn.Embedding.from_pretrained(torch.empty(vocab_size, hidden_size), freeze=False)
            self.position_embedding = nn.Parameter(torch.empty(sequence_length, hidden_size))
            self.class_embedding = nn.Parameter(torch.empty(hidden_size))
            self.text_blocks = nn.ModuleList([Block(a, layer) for layer in range(text_layers)])
            self.text_norm = make_norm(norm, hidden_size, norm_eps, bias)
            self.text_projection = nn.Linear(hidden_size, embedding_size, bias=False)
            self.log_scale = nn.Parameter(torch.empty(1))
            self.blocks = nn.ModuleList([CrossBlock(a, layer, hidden_size) for layer in range(multimodal_layers)])
            self.norm = make_norm(norm, hidden_size, norm_eps, bias)
            self.head = LinearHead(vocab_size, hidden_size, vocab_size)
        self._roles = {name: kind for name, kind in roles(self).items() if not name.startswith("vision.")}
        if device.type != "meta":
            # The encoder has its values already, perhaps trained ones.
            for child in (child for child in self.children() if child is not vision):
                child.to_empty(device=device)
            for name in ("position_embedding", "class_embedding", "log_scale"):
                setattr(self, name, nn.Parameter(torch.empty_like(getattr(self, name), device=device)))
            for name, value in self._own_values():
                fill(self, name, value)

    def forward(
        self, tokens_BT: Tensor, images_BCHW: Tensor | None = None, segments_BT: Tensor | None = None
    ) -> CoCaOutput:
        """Captions and their images to what ``loss.coca`` compares and predicts.

        Args:
            tokens_BT: (B, T) int64, inputs of the captions.
            images_BCHW: (B, C, H, W), uint8, or floats in [-1, 1].
            segments_BT: (B, T) integers, 0 for the tokens of the caption; whatever else is padding behind it, which
                the class token does not see. None where all tokens are captions.

        Raises:
            ConfigError: there are no images, they have another size, or the captions are too long.
        """
        if images_BCHW is None:
            raise ConfigError(
                "a contrastive captioner looks at images, and there are none",
                hint="train it on images and captions, such as dataset.image_text has; "
                "modalities_models.captions.generate_captions describes images",
                about=self,
            )
        seen_BQD, images_BE = self.encode_images(images_BCHW)
        hidden_BTD, texts_BE = self._read(tokens_BT, segments_BT)
        mask = causal(tokens_BT)
        prepare(mask, self.architecture, hidden_BTD, self)
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD, seen_BQD, mask)
        scale = self.log_scale.float().clamp(max=math.log(LARGEST_SCALE)).exp()
        return CoCaOutput(self.norm(hidden_BTD), images_BE, texts_BE, scale)

    def encode_images(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) to tokens for captioning (B, Q, D) and vectors of length 1 (B, E)."""
        pooled_BPD = self.image_pooling(self.vision(images_BCHW))
        images_BE = F.normalize(self.image_projection(pooled_BPD[:, -1]), dim=-1)
        return pooled_BPD[:, :-1], images_BE

    def encode_texts(self, tokens_BT: Tensor, segments_BT: Tensor | None = None) -> Tensor:
        """Captions, as for ``forward``, to vectors of length 1, (B, E)."""
        return self._read(tokens_BT, segments_BT)[1]

    def decode(self, tokens_BT: Tensor, seen_BQD: Tensor, caches: Sequence[KeyValueCache] | None = None) -> Tensor:
        """Tokens of captions and of images to hidden states (B, T, D); what ``forward`` gives, without comparing.

        Args:
            tokens_BT: (B, T) int64; with caches, those that follow what the caches hold.
            seen_BQD: from ``encode_images``.
            caches: one per block, from ``caption_caches``; extended by these tokens.
        """
        past = caches[0].length if caches else 0
        mask = causal(tokens_BT, past)
        held: list[KeyValueCache | None] = [*caches] if caches else [None] * (len(self.text_blocks) + len(self.blocks))
        hidden_BTD = self._embed(tokens_BT, past)
        prepare(mask, self.architecture, hidden_BTD, self)
        for block, cache in zip(self.text_blocks, held, strict=False):
            hidden_BTD = block(hidden_BTD, None, mask, cache)
        for block, cache in zip(self.blocks, held[len(self.text_blocks) :], strict=True):
            hidden_BTD = block(hidden_BTD, seen_BQD, mask, cache)
        return self.norm(hidden_BTD)

    def caption_caches(self) -> list[KeyValueCache]:
        """Empty caches for ``decode``, one per block."""
        return [KeyValueCache(self.sequence_length) for _ in range(self.architecture.layers)]

    def parallel_plan(self) -> ParallelPlan:
        """Every block of the three stacks is one unit of sharding, recomputation and compilation."""
        return ParallelPlan(blocks=("vision.blocks.*", "text_blocks.*", "blocks.*"))

    def initial_values(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's name and whole initial value, float32 on the CPU; the same on every rank."""
        for name, value in self.vision.initial_values():
            yield f"vision.{name}", value
        yield from self._own_values()

    def flops_per_token(self, sequence_length: int) -> float:
        """Training FLOPs per token of a caption, the image shared out among its tokens (PaLM convention)."""
        a, read = self.architecture, self.vision.tokens
        pooled = self.image_pooling.query_embedding.shape[0]
        width = a.heads * a.head_size
        # Keys and values of the poolers are computed per token of the image, and of the blocks per pooled token.
        pooling = 6 * matmul_parameters(self.image_pooling) * (read + pooled) / 2 + 12 * width * pooled * read
        context = [part for part in self.blocks.modules() if isinstance(part, CrossAttention)]
        looked_at = 6 * sum(part.key.weight.numel() + part.value.weight.numel() for part in context)
        of_text = matmul_parameters(self.text_blocks) + matmul_parameters(self.blocks) + self.head.weight.numel()
        attention = 12 * width * (a.layers * sequence_length + len(self.blocks) * pooled)
        per_image = self.vision.flops_per_image() + pooling + looked_at * pooled
        return float(6 * of_text - looked_at + attention + per_image / sequence_length)

    def causal_flops_per_token(self, sequence_length: int) -> float:
        """The same, but the text's attention to itself counts half, the other half being masked."""
        a = self.architecture
        return self.flops_per_token(sequence_length) - 6.0 * a.heads * a.head_size * a.layers * sequence_length

    def _read(self, tokens_BT: Tensor, segments_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        """The lower half of the decoder: hidden states (B, T, D) of the tokens, and vectors (B, E) of the texts."""
        hidden_BTD = self._embed(tokens_BT, 0)
        class_B1D = self.class_embedding.to(hidden_BTD.dtype).expand(hidden_BTD.shape[0], 1, -1)
        hidden_BUD = torch.cat((hidden_BTD, class_B1D), 1)  # U: T tokens and the class token
        segments_BU = None if segments_BT is None else F.pad(segments_BT, (0, 1))
        mask = causal(hidden_BUD[..., 0], segments_BT=segments_BU)
        prepare(mask, self.architecture, hidden_BUD, self)
        for block in self.text_blocks:
            hidden_BUD = block(hidden_BUD, None, mask)
        texts_BE = F.normalize(self.text_projection(self.text_norm(hidden_BUD[:, -1])), dim=-1)
        return hidden_BUD[:, :-1], texts_BE

    def _embed(self, tokens_BT: Tensor, past: int) -> Tensor:
        length = past + tokens_BT.shape[1]
        if length > self.sequence_length:
            raise ConfigError(
                f"the model takes captions of at most {self.sequence_length} tokens, not {length}",
                about=(self, "sequence_length"),
            )
        hidden_BTD = self.embedding(tokens_BT) + self.position_embedding[past:length]
        dropout = self.architecture.dropout
        return F.dropout(hidden_BTD, dropout) if dropout and self.training else hidden_BTD

    def _own_values(self) -> Iterator[tuple[str, Tensor]]:
        for name, (shape, role) in self._roles.items():
            if name == "log_scale":
                yield name, torch.full(shape, -math.log(self.temperature), dtype=torch.float32, device="cpu")
            else:
                yield name, initial_value(name, shape, role, self.initialization, self.seed)
