"""Parameters, FLOPs and memory against tables computed by hand, published totals, built models and what autograd keeps.

The arithmetic of the tables is written out, so that a reader can follow every number.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from modalities_models.architecture import Architecture
from modalities_models.counts import activations_per_token, flops_per_token, memory, parameter_count
from modalities_models.decoder import decoder
from modalities_models.nn.block import Block
from modalities_models.nn.masks import causal
from modalities_models.nn.mixture_of_experts import MixtureOfExperts
from modalities_models.nn.rope import rotation
from modalities_models.presets import PRESETS, resolve

# Per block: query, key, value and output projections; gate, up and down; norms, query-key norms, biases.
LLAMA3_8B = {
    "block": 4096 * 4096 + 2 * 4096 * 1024 + 4096 * 4096 + 3 * 4096 * 14_336 + 2 * 4096,  # 218_112_000
    "matmul": 32 * (41_943_040 + 176_160_768) + 128_256 * 4096,
    "embedding": 128_256 * 4096,  # 525_336_576
    "total": 32 * 218_112_000 + 2 * 525_336_576 + 4096,
}
QWEN3_06B = {
    # 16 heads of 128 are twice as wide as the residual stream; 8 key-value heads are as wide.
    "block": 2 * 1024 * 2048 + 2 * 1024 * 1024 + 3 * 1024 * 3072 + 2 * 1024 + 2 * 128,  # 15_730_944
    "matmul": 28 * (6_291_456 + 9_437_184) + 151_936 * 1024,
    "embedding": 151_936 * 1024,  # 155_582_464, which is the head's too
    "total": 28 * 15_730_944 + 155_582_464 + 1024,
}
GPT2 = {
    # Projections with biases: 768 to 768 four times, 768 to 3072 and back; two LayerNorms with offsets.
    "block": 4 * (768 * 768 + 768) + 768 * 3072 + 3072 + 3072 * 768 + 768 + 2 * 2 * 768,  # 7_087_872
    "matmul": 12 * (4 * 589_824 + 2 * 2_359_296) + 50_257 * 768,
    "embedding": 50_257 * 768 + 1024 * 768,  # 38_597_376 + 786_432
    "total": 12 * 7_087_872 + 38_597_376 + 786_432 + 2 * 768,
}
TABLES = {"llama3-8b": LLAMA3_8B, "qwen3-0.6b": QWEN3_06B, "gpt2": GPT2}


@pytest.mark.parametrize(
    ("preset", "block", "matmul", "total"),
    [
        ("llama3-8b", 218_112_000, 7_504_658_432, 8_030_261_248),
        ("qwen3-0.6b", 15_730_944, 595_984_384, 596_049_920),
        ("gpt2", 7_087_872, 123_532_032, 124_439_808),
    ],
)
def test_parameters_by_hand(preset, block, matmul, total):
    table = TABLES[preset]
    assert (table["block"], table["matmul"], table["total"]) == (block, matmul, total), "the table itself"
    count = parameter_count(resolve(preset, {}))
    assert (count.total, count.embedding, count.matmul) == (total, table["embedding"], matmul)
    assert count.active == total


# Totals as the publishers' own checkpoints add up to; those of mixtures with the parameters active per token.
@pytest.mark.parametrize(
    ("preset", "total", "active"),
    [
        ("qwen2.5-0.5b", 494_032_768, None),
        ("llama-1b", 1_100_048_384, None),
        ("olmo2-1b", 1_484_916_736, None),
        ("gemma2-2b", 2_614_341_888, None),
        ("mistral-7b", 7_241_732_096, None),
        # "13B active" (arXiv:2401.04088); per block 6 of 8 experts of 3 * 4096 * 14336 stand still.
        ("mixtral-8x7b", 46_702_792_704, 46_702_792_704 - 32 * 6 * 176_160_768),
        # "30.5B in total and 3.3B activated"; per block 120 of 128 experts of 3 * 2048 * 768 stand still.
        ("qwen3-30b-a3b", 30_532_122_624, 30_532_122_624 - 48 * 120 * 4_718_592),
    ],
)
def test_presets_have_the_published_parameters(preset, total, active):
    count = parameter_count(resolve(preset, {}))
    assert count.total == total
    assert count.active == (total if active is None else active)
    with torch.device("meta"):
        assert decoder(preset).parameter_count == total


def test_active_parameters_are_the_published_ones():
    assert parameter_count(resolve("mixtral-8x7b", {})).active == pytest.approx(12.9e9, rel=0.005)
    assert parameter_count(resolve("qwen3-30b-a3b", {})).active == pytest.approx(3.3e9, rel=0.02)


MIXTURE = MixtureOfExperts(
    experts=5, experts_per_token=2, intermediate_size=24, shared_intermediate_size=16, shared_gate=True
)
OPTIONS = {
    "norm": ("rms", "layer"),
    "norm_placement": ("pre", "post", "sandwich"),
    "activation": ("swiglu", "gelu"),
    "feedforward": (None, MIXTURE),
    "positions": ("rope", "absolute"),
    "bias": (False, True),
    "query_key_value_bias": (None, True),
    "query_key_norm": ("none", "head", "projection"),
    "tied_embeddings": (False, True),
}
TINY = {"vocab_size": 61, "sequence_length": 16, "hidden_size": 32, "layers": 2, "heads": 4, "key_value_heads": 2}


def test_counts_are_those_of_the_built_model():
    every_third = itertools.islice(itertools.product(*OPTIONS.values()), 0, None, 3)
    for values in every_third:
        changes = {name: value for name, value in zip(OPTIONS, values, strict=True) if value is not None}
        with torch.device("meta"):
            model = decoder(**TINY, **changes)
        count = parameter_count(model.architecture)
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        assert count.total == sum(sizes.values()), changes
        matrices = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() > 1}
        matmul = sum(p.numel() for name, p in matrices.items() if not name.startswith(("embedding", "positions")))
        experts = sum(p.numel() for p in matrices.values() if p.dim() == 3)
        idle = experts * 3 // 5
        assert count.active == count.total - idle, changes
        assert count.matmul == matmul - idle + (61 * 32 if model.architecture.tied_embeddings else 0), changes


@pytest.mark.parametrize(
    ("preset", "length", "full", "causal_half"),
    [
        # 6 * 7_504_658_432 = 45_027_950_592; 12 * 32 blocks * 4096 * 8192 = 12_884_901_888, and half of it.
        ("llama3-8b", 8192, 57_912_852_480, 51_470_401_536),
        # 6 * 595_984_384 = 3_575_906_304; 12 * 28 * 2048 * 4096 = 2_818_572_288.
        ("qwen3-0.6b", 4096, 6_394_478_592, 4_985_192_448),
        # 6 * 123_532_032 = 741_192_192; 12 * 12 * 768 * 1024 = 113_246_208.
        ("gpt2", 1024, 854_438_400, 797_815_296),
        # 12 * 32 * 4096 * 32768 = 51_539_607_552 would be without windows; with 4096 keys 6_442_450_944, and on the
        # mean over the sequence 4096 * (1 - 4096 / 65536) = 3840 keys: 6_039_797_760. Matmul 7_110_393_856.
        ("mistral-7b", 32_768, 6 * 7_110_393_856 + 6_442_450_944, 6 * 7_110_393_856 + 6_039_797_760),
        # 13 blocks of 4096 keys and 13 of 8192, 2048 wide: 12 * 2048 * 13 * 12288 = 3_925_868_544. On the mean
        # 4096 * (1 - 4096 / 16384) = 3072 and 4096: 12 * 2048 * 13 * 7168 = 2_290_089_984.
        # Matmul 26 * (14_155_776 + 63_700_992) + 256_000 * 2304 = 2_614_099_968.
        ("gemma2-2b", 8192, 6 * 2_614_099_968 + 3_925_868_544, 6 * 2_614_099_968 + 2_290_089_984),
        # Active only: 32 * (41_943_040 + 32_768 + 2 * 176_160_768) + 32_000 * 4096 = 12_748_587_008.
        ("mixtral-8x7b", 4096, 6 * 12_748_587_008 + 12 * 32 * 4096 * 4096, 6 * 12_748_587_008 + 6 * 32 * 4096 * 4096),
    ],
)
def test_flops_by_hand(preset, length, full, causal_half):
    architecture = resolve(preset, {})
    assert flops_per_token(architecture, length) == full
    assert flops_per_token(architecture, length, "causal") == causal_half
    with torch.device("meta"):
        model = decoder(preset)
    assert model.flops_per_token(length) == full
    assert model.causal_flops_per_token(length) == causal_half


def test_matmul_flops_are_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model = decoder(**TINY, feedforward=MIXTURE)
    tokens = torch.randint(61, (3, 16))
    with FlopCounterMode(display=False) as counter:
        model.head(model(tokens)).sum().backward()
    counted = counter.get_total_flops() / tokens.numel()
    # In each of two blocks torch does not see into the products of 2 experts of 3 * 24 * 32, and it counts the weighted
    # sum of what the 2 gave, 32 wide; its counter does not know attention on the CPU.
    unseen, mixing = 6 * 2 * 2 * 3 * 24 * 32, 6 * 2 * 2 * 32
    assert counted == 6 * parameter_count(model.architecture).matmul - unseen + mixing


@pytest.mark.parametrize(
    ("preset", "arguments", "weights", "per_token_and_layer", "logits"),
    [
        # Over 8 devices 4 bytes of 8_030_261_248. Norms 2 * 4096, attention 3 * 4096 + 2 * 1024, feed-forward
        # 4096 + 4 * 14336. Logits 8192 * 128256 of 4 + 4 + 2 bytes.
        ("llama3-8b", (1, 8192, "bf16", 8), 4_015_130_624, 8192 + 14_336 + 61_440, 10_506_731_520),
        # 4 bytes of 596_049_920. Attention 1024 + 2 * 2048 + 2 * 1024 and 2048 + 1024 for the query-key norm.
        # Logits of 1024 tokens at a time: 1024 * 151936 * 8.
        ("qwen3-0.6b", (2, 4096, "fp32", 1, 1024), 2_384_199_680, 2048 + 10_240 + 13_312, 1_244_659_712),
        # 4 bytes of 124_439_808; feed-forward 768 + 2 * 3072. Logits 16 * 1024 * 50257 * 10.
        ("gpt2", (16, 1024), 497_759_232, 1536 + 3840 + 6912, 8_234_106_880),
    ],
)
def test_memory_by_hand(preset, arguments, weights, per_token_and_layer, logits):
    architecture = resolve(preset, {})
    estimate = memory(architecture, *arguments)
    assert estimate[:3] == (weights, weights, 2 * weights)
    assert activations_per_token(architecture, 0) == per_token_and_layer
    width = 4 if "fp32" in arguments else 2
    tokens = arguments[0] * arguments[1]
    assert estimate.activations == tokens * architecture.layers * per_token_and_layer * width
    assert estimate.logits == logits
    assert estimate.total == 4 * weights + estimate.activations + logits


KEPT = {
    "llama": {"key_value_heads": 2},
    "qwen3": {"query_key_norm": "head", "head_size": 32},
    "gpt2": {"norm": "layer", "activation": "gelu", "bias": True, "positions": "absolute"},
    "gemma": {"norm_placement": "sandwich", "activation": "geglu"},
    "squared": {"activation": "relu_squared"},
    "mixture": {
        "feedforward": MixtureOfExperts(
            experts=4, experts_per_token=2, intermediate_size=96, shared_intermediate_size=32
        )
    },
}


@pytest.mark.parametrize("kind", KEPT)
def test_activations_are_about_what_autograd_keeps(kind):
    numbers = {"vocab_size": 61, "sequence_length": 128, "hidden_size": 64, "layers": 1, "heads": 4}
    architecture = resolve(None, numbers | KEPT[kind])
    block = Block(architecture, 0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.1)
    hidden = torch.randn(2, 128, 64, requires_grad=True)
    turned = rotation(torch.arange(128), architecture.head_size, 1e4) if architecture.positions == "rope" else None
    mask = causal(torch.zeros(2, 128, dtype=torch.int64))
    not_counted = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    if turned is not None:
        not_counted |= {turned.cos_T1F.untyped_storage().data_ptr(), turned.sin_T1F.untyped_storage().data_ptr()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_counted and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(hidden, turned, mask)
    elements = sum(kept.values()) / 4 / (2 * 128)
    assert activations_per_token(architecture, 0) == pytest.approx(elements, rel=0.05)


def test_padding_of_the_vocabulary_counts_in_memory_only():
    plain, padded = resolve("gpt2", {}), resolve("gpt2", {"vocab_multiple": 128})
    assert isinstance(padded, Architecture) and padded.stored_vocab_size == 50_304
    assert parameter_count(plain) == parameter_count(padded)
    assert flops_per_token(plain, 8) == flops_per_token(padded, 8)
    assert memory(padded, 1, 8).weights - memory(plain, 1, 8).weights == 47 * 768 * 4


def test_every_preset_has_counts():
    for preset in PRESETS:
        count = parameter_count(resolve(preset, {}))
        assert count.total >= count.active >= count.matmul - count.embedding > 0
