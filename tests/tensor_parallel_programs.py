"""What the ranks of the tests of tensor and context parallelism run."""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.distributed.fsdp
from rank_programs import arrange, main, whole

from modalities_core.interfaces import Batch
from modalities_core.training.executor import Plain
from modalities_core.training.optim import adamw, sgd
from modalities_models.decoder import decoder
from modalities_models.huggingface.wrapped import huggingface
from modalities_models.losses import CrossEntropy
from modalities_models.nn.mixture_of_experts import MixtureOfExperts
from modalities_parallel.fsdp import fsdp2
from modalities_parallel.world import auto

VOCABULARY, LENGTH, SAMPLES = 96, 16, 8
SMALL = {"vocab_size": VOCABULARY, "sequence_length": LENGTH, "hidden_size": 32, "layers": 2, "heads": 4}
BASE = {**SMALL, "intermediate_size": 42, "key_value_heads": 2, "norm_eps": 1e-3}
ARCHITECTURES = {
    "llama": BASE,
    "tied": BASE | {"tied_embeddings": True, "vocab_multiple": 64, "embedding_multiplier": 5.0},
    "biases": BASE | {"bias": True, "norm": "layer", "positions": "absolute", "activation": "gelu"},
    "heads normed": BASE | {"query_key_norm": "head", "key_value_heads": 4, "intermediate_size": 44},
    "projection normed": BASE | {"query_key_norm": "projection", "norm_placement": "post"},
    "sandwich": BASE | {"norm_placement": "sandwich", "attention_windows": [5, None], "logit_softcap": 20.0},
    "experts": BASE
    | {"feedforward": {"experts": 4, "experts_per_token": 2, "dense_layers": (0,), "shared_gate": True}},
}

OPTIMIZERS = {
    "adamw": functools.partial(adamw, lr=1e-2, eps=1e-3),
    "sgd": functools.partial(sgd, lr=1e-1, momentum=0.9),
}


FAMILY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": LENGTH,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 3,
}


def build(name):
    if name.startswith("huggingface "):
        family = name.split()[1]
        more = {} if family in ("gpt_neox", "phi") else {"num_key_value_heads": 2}
        more |= {"head_dim": 8} if family in ("qwen3", "gemma", "gemma2", "gemma3_text") else {}
        return huggingface(model_type=family, config=FAMILY | more, attention="sdpa")
    given = dict(ARCHITECTURES[name])
    if "feedforward" in given:
        sizes = {"intermediate_size": 16, "shared_intermediate_size": 24}
        given["feedforward"] = MixtureOfExperts(**given["feedforward"], **sizes)
    return decoder(**given, seed=3)


def samples(step, rows, documents=False, length=LENGTH):
    """Those ``rows`` of a step; their weights are anything but even."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (SAMPLES, length + 1), generator=generator)
    weights = torch.rand((SAMPLES, length), generator=generator)
    weights[1] = 0
    starts = torch.rand((SAMPLES, length), generator=generator) < 0.2
    segments = starts.cumsum(1).int() if documents else None
    return Batch(tokens[rows, :-1], tokens[rows, 1:], weights[rows], None if segments is None else segments[rows])


def weights(model):
    for module in model.modules():
        if isinstance(module, torch.distributed.fsdp.FSDPModule):
            module.reshard()
    return {name: whole(value) for name, value in model.named_parameters()}


def train(
    world,
    model,
    steps=4,
    accumulation=1,
    documents=False,
    loss=None,
    optimizer="adamw",
    compile="none",
    odd=None,
    **more,
):
    """Losses, norms and what held-out data gives after each step; weights before and after."""
    from modalities_parallel import recomputation

    options = {"param_dtype": more.get("param_dtype", "fp32")}

    def make():
        built = build(model)
        if more.get("recompute") == "blocks":
            recomputation.whole_blocks(built)
        if more.get("recompute") == "selective":
            recomputation.selective(built)
        return built

    net = fsdp2(make, world, **options)
    executor = Plain(net, loss or CrossEntropy(), world, compile=compile)
    updates = OPTIMIZERS[optimizer](net, **more.get("settings", {}))
    before = weights(net)
    share = SAMPLES // world.data_size
    first, size = world.data_rank * share, share // accumulation
    history = []
    for step in range(steps):
        parts = [slice(first + n * size, first + (n + 1) * size) for n in range(accumulation)]
        sums = executor.forward_backward([samples(step, rows, documents) for rows in parts])
        squared = world.norm_share(list(net.parameters()), 2.0)
        held = samples(100 + step, slice(first, first + share), documents, length=odd or LENGTH)
        total, tokens, square = world.sum(
            torch.stack([sums.loss.double(), sums.tokens.double(), squared.double()])
        ).tolist()
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(tokens)
        updates.step()
        updates.zero_grad(set_to_none=True)
        getattr(net, "finish_step", lambda world: None)(world)
        evaluated = world.sum(torch.stack(executor.evaluate(held))).tolist()
        history.append([total / tokens, square**0.5 / tokens, evaluated[0] / evaluated[1]])
    return history, before, weights(net)


def cases(plan, out):
    """One run per case: mesh, model, and arguments of ``train``."""
    world = auto(timeout_seconds=120)
    found = []
    for place, (mesh, model, options) in enumerate(plan):
        history, before, after = train(arrange(world, mesh), model, **options)
        if world.rank == 0:
            np.savez(f"{out}-{place}.npz", **{f"before.{n}": v for n, v in before.items()}, **after)
        found.append(history)
    world.close()
    return found


if __name__ == "__main__":
    main(globals())
