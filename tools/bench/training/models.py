"""The models that are trained, how much of each a step takes, and the options of our side: all in one table.

Llama-like: RMSNorm before, rotary positions, SwiGLU, no bias, a head of its own. Symbols: D hidden size, L layers,
H query heads, G key-value heads, F head size, I intermediate size, V vocabulary size, S sequence length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The numbers of a model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    sequence_length: int
    rope_theta: float = 10_000.0

    @property
    def matmul_parameters(self) -> int:
        """Weights that multiply activations: D * D of queries and output, D * G * F twice, D * I thrice, and D * V."""
        d, narrow = self.hidden_size, self.hidden_size // self.heads * self.key_value_heads
        return self.layers * (2 * d * d + 2 * d * narrow + 3 * d * self.intermediate_size) + d * self.vocab_size

    @property
    def parameters(self) -> int:
        """All: those, the embedding and the norms."""
        norms = (2 * self.layers + 1) * self.hidden_size
        return self.matmul_parameters + self.vocab_size * self.hidden_size + norms

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs, forward and backward, causality not discounted (PaLM, arXiv:2204.02311 appendix B)."""
        return 6.0 * self.matmul_parameters + 12.0 * self.layers * self.hidden_size * self.sequence_length

    @property
    def causal_flops_per_token(self) -> float:
        """The same where a query meets half of the keys (Megatron-LM)."""
        return 6.0 * self.matmul_parameters + 6.0 * self.layers * self.hidden_size * self.sequence_length


@dataclass(frozen=True)
class Case:
    """One model and how it is trained.

    device: ``cpu`` or ``cuda``.
    samples_per_step: of every optimizer step.
    micro_batch_size: samples computed at once; the first of these that fits into the device's memory is taken.
    warmup: steps that do not count, because something is still being compiled or allocated.
    steps: that count.
    weights: ``fp32`` and computing in bf16, or ``bf16`` where float32 weights and states do not fit into memory.
    ours: variants of our side by name: parts of the configuration file and what they have beside the stock.
    skip: peers that cannot do this one, and why.
    """

    device: str
    shape: Shape
    samples_per_step: int
    micro_batch_size: tuple[int, ...]
    warmup: int = 5
    steps: int = 10
    lr: float = 1e-3
    weights: str = "fp32"
    ours: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    skip: Mapping[str, str] = field(default_factory=dict)


def _shape(vocab: int, hidden: int, intermediate: int, layers: int, heads: int, length: int, **more: Any) -> Shape:
    return Shape(vocab, hidden, intermediate, layers, heads, more.pop("key_value_heads", heads), length, **more)


EAGER = {"executor": {"precision": "bf16", "compile": "none"}}
COMPILED = {"executor": {"precision": "bf16", "compile": "blocks"}}
CPU_OURS = {"ours": COMPILED, "ours, eager": EAGER}
BF16_WEIGHTS = {
    "executor": {"precision": "bf16_weights", "compile": "blocks"},
    "optimizer": {"state_dtype": "bf16", "rounding": "stochastic"},
}  # fmt: skip
TENSORWISE = {"float8": {"recipe": "tensorwise"}}
GPU_SKIP = {"hf, defaults": "fp32 on a GPU takes too long", "plain, eager": "compiled is its best"}

# Intermediate sizes near 8/3 of the hidden size give nanochat's model as many weights.
CASES: Mapping[str, Case] = {
    # The quick start's model, batch and length.
    "quickstart": Case("cpu", _shape(2048, 192, 512, 3, 3, 128), 16, (16,), warmup=20, steps=100, ours=CPU_OURS),
    "cpu-10m": Case("cpu", _shape(8192, 256, 688, 6, 4, 256), 16, (16,), ours=CPU_OURS),
    "cpu-20m": Case("cpu", _shape(8192, 384, 1024, 8, 6, 512), 8, (8,), ours=CPU_OURS),
    # The preset llama-60m.
    "cpu-60m": Case("cpu", _shape(32_000, 512, 1376, 8, 8, 512), 4, (4,), steps=5, ours=CPU_OURS),
    "cuda-125m": Case("cuda", _shape(32_000, 768, 2048, 12, 12, 2048), 128, (64, 32, 16, 8), warmup=10, steps=40,
                      ours={"ours": COMPILED}),
    "cuda-500m": Case("cuda", _shape(32_000, 1280, 3456, 20, 10, 2048), 128, (32, 16, 8, 4), warmup=10, steps=30,
                      ours={"ours": COMPILED}, skip=GPU_SKIP),
    "cuda-1.5b": Case("cuda", _shape(32_000, 2048, 5504, 26, 16, 4096), 64, (8, 4, 2, 1), warmup=5, steps=15, lr=3e-4,
                      ours={"ours": COMPILED, "ours, fp8": {**COMPILED, **TENSORWISE}}, skip=GPU_SKIP),
    # Llama 3 8B (arXiv:2407.21783) at half of its length. 16 bytes of float32 per parameter would not fit.
    "cuda-8b": Case("cuda", _shape(128_256, 4096, 14_336, 32, 32, 4096, key_value_heads=8, rope_theta=500_000.0), 16,
                    (2, 1), warmup=4, steps=8, lr=1e-4, weights="bf16", ours={
                        "ours": BF16_WEIGHTS,
                        "ours, fp8": {**BF16_WEIGHTS, **TENSORWISE},
                        "ours, int8 states": {**BF16_WEIGHTS, "optimizer": {"state_dtype": "int8"}},
                    }, skip={**GPU_SKIP, "nanochat": "its value embeddings would add 2 billion parameters"}),
}  # fmt: skip
