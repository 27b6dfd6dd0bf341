"""Attention to another sequence, pooling and the block with both against PyTorch's own layers."""

from __future__ import annotations

import torch
from torch import nn

from modalities_models.architecture import Architecture
from modalities_models.nn.cross_attention import AttentionPooling, CrossAttention, CrossBlock
from modalities_models.nn.masks import causal

T = 6


def architecture(**more):
    numbers = {"hidden_size": 24, "layers": 1, "heads": 3, "key_value_heads": 3, "head_size": 8}
    return Architecture(
        vocab_size=1, sequence_length=T, intermediate_size=40, norm="layer", activation="gelu", positions="none",
        bias=True, **numbers | more,
    )  # fmt: skip


def test_cross_attention_is_that_of_torch():
    ours, theirs = CrossAttention(24, 16, 3, 8), nn.MultiheadAttention(24, 3, kdim=16, vdim=16, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_bias.normal_()
        for name in ("query", "key", "value"):
            getattr(theirs, f"{name[0]}_proj_weight").copy_(getattr(ours, name).weight)
        theirs.in_proj_bias.copy_(torch.cat((ours.query.bias, ours.key.bias, ours.value.bias)))
        theirs.out_proj.load_state_dict(ours.output.state_dict())
    hidden, context = torch.randn(2, 4, 24), torch.randn(2, 7, 16)
    torch.testing.assert_close(ours(hidden, context), theirs(hidden, context, context)[0])


def test_pooling_is_cross_attention_of_learned_queries():
    pooling = AttentionPooling(4, architecture(), 16)
    nn.init.normal_(pooling.query_embedding)
    context = torch.randn(2, 7, 16)
    expected = pooling.attention(pooling.query_embedding.repeat(2, 1, 1), context)
    torch.testing.assert_close(pooling(context), nn.functional.layer_norm(expected, (24,), eps=1e-5))
    # A set has no order.
    torch.testing.assert_close(pooling(context[:, torch.randperm(7)]), pooling(context))


def test_a_cross_block_is_a_decoder_layer_of_torch():
    ours = CrossBlock(architecture(), 0, 24)
    theirs = nn.TransformerDecoderLayer(
        24, 3, 40, dropout=0.0, activation=lambda x: nn.functional.gelu(x, approximate="tanh"), batch_first=True,
        norm_first=True,
    )  # fmt: skip
    for value in ours.parameters():
        nn.init.normal_(value, std=0.3)
    pairs = {
        "norm1": "attention_norm", "norm2": "cross_attention_norm", "norm3": "feedforward_norm",
        "linear1": "feedforward.up", "linear2": "feedforward.down",
        "self_attn.out_proj": "attention.output", "multihead_attn.out_proj": "cross_attention.output",
    }  # fmt: skip
    with torch.no_grad():
        for their, our in pairs.items():
            theirs.get_submodule(their).load_state_dict(ours.get_submodule(our).state_dict())
        for their, our in ((theirs.self_attn, ours.attention), (theirs.multihead_attn, ours.cross_attention)):
            three = (our.query, our.key, our.value)
            their.in_proj_weight.copy_(torch.cat([part.weight for part in three]))
            their.in_proj_bias.copy_(torch.cat([part.bias for part in three]))
    hidden, context = torch.randn(2, T, 24), torch.randn(2, 7, 24)
    later = nn.Transformer.generate_square_subsequent_mask(T)
    expected = theirs(hidden, context, tgt_mask=later)
    torch.testing.assert_close(ours(hidden, context, causal(hidden[..., 0])), expected)
