"""What a model of transformers costs, from its modules and its config."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
WINDOWED = ("sliding_attention", "chunked_attention")


def matmul_parameters(network: nn.Module, config: Any, head: nn.Module) -> float:
    """Weights that multiply activations for one token; of experts the share that a token passes through.

    Call it where the parameters are whole: on the meta device, or before sharding.

    Args:
        network: the causal language model.
        config: of its text.
        head: its output embeddings; counted also where they are the input embeddings.
    """
    experts, chosen = _number(config, EXPERTS), _number(config, CHOSEN)
    active = min(chosen / experts, 1.0) if experts and chosen else 1.0
    outputs = set(head.parameters())
    total = 0.0
    for name, module in network.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        routed = "experts" in name.split(".")
        for parameter in module.parameters(recurse=False):
            if parameter.ndim >= 2 and parameter not in outputs:
                total += parameter.numel() * (active if routed else 1.0)
    return total + head.weight.numel()  # pyrefly: ignore[not-callable]


def attention_flops(config: Any, sequence_length: int, convention: Literal["full", "causal"] = "full") -> float:
    """Of scores and weighted sums in all layers: 12 * H * F * keys each; layers without attention have none.

    Args:
        config: of its text.
        sequence_length: tokens of a sample.
        convention: as in :func:`modalities_models.counts.flops_per_token`: ``full`` discounts a window and not
            causality (PaLM, arXiv:2204.02311 appendix B), ``causal`` both.
    """
    heads, layers = getattr(config, "num_attention_heads", None), getattr(config, "num_hidden_layers", None)
    if not heads or not layers:
        return 0.0
    heads = max(heads) if isinstance(heads, list | tuple) else heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    both = (getattr(config, "qk_head_dim", None) or size) + (getattr(config, "v_head_dim", None) or size)
    return 6.0 * heads * both * sum(_keys(config, layers, sequence_length, convention))


def _keys(config: Any, layers: int, sequence_length: int, convention: Literal["full", "causal"]) -> list[float]:
    """How many keys a query meets in each layer."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    window = window or getattr(config, "attention_chunk_size", None)
    near = float(min(window, sequence_length) if window else sequence_length)
    far = float(sequence_length)
    if convention == "causal":
        # A chunk is seen from its start, a sliding window is full but for the first tokens of the sample.
        chunked = window is not None and getattr(config, "sliding_window", None) is None
        near *= 0.5 if chunked else 1 - near / (2 * sequence_length)
        far /= 2
    types = getattr(config, "layer_types", None)
    if types is None:
        return [near] * layers
    return [near if kind in WINDOWED else far if kind == "full_attention" else 0.0 for kind in types]


def _number(config: Any, names: tuple[str, ...]) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)
