"""Loads of experts that start uneven and even out as a small model learns."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from modalities_core.interfaces import Batch
from modalities_core.training.world import Alone
from modalities_models.decoder import Decoder, decoder
from modalities_models.losses import CrossEntropy
from modalities_models.nn.mixture_of_experts import MixtureOfExperts, Router

EXPERTS, VOCAB, LENGTH = 8, 64, 32


def uneven(balance_rate: float) -> Decoder:
    """A model in which nearly all tokens prefer the same expert: they share a direction that it scores highly."""
    mixture = MixtureOfExperts(
        experts=EXPERTS, experts_per_token=2, intermediate_size=16, balance_rate=balance_rate, score="sigmoid"
    )
    sizes = {"vocab_size": VOCAB, "sequence_length": LENGTH, "hidden_size": 32, "layers": 2, "heads": 2}
    model = decoder(**sizes, feedforward=mixture)
    shared = torch.randn(32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.embedding.weight.add_(0.1 * shared)
        for module in model.modules():
            if isinstance(module, Router):
                module.weight[0] = 0.1 * shared
    return model


def loads_of_steps(model: Decoder, steps: int) -> tuple[torch.Tensor, list[float]]:
    """Each step's largest load over the mean, (steps, layers), and the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    routers = [module for module in model.modules() if isinstance(module, Router)]
    worst, losses = [], []
    for step in range(steps):
        tokens = torch.randint(VOCAB, (8, LENGTH + 1), generator=torch.Generator().manual_seed(step)).sort(-1).values
        hidden = model(tokens[:, :-1])
        loss = CrossEntropy()(hidden, model.head, Batch(tokens[:, :-1], tokens[:, 1:]))
        (loss.loss / loss.tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        loads = torch.stack([counted(model, router) for router in routers])
        worst.append(loads.max(-1).values / loads.mean(-1))
        losses.append((loss.loss / loss.tokens).item())
        model.finish_step(Alone("cpu"))
    return torch.stack(worst), losses


def counted(model: Decoder, router: Router) -> torch.Tensor:
    return router.load.float() if router.balance is not None else model.recorded[router]


def record(model: Decoder) -> None:
    """Count the choices of routers that do not count themselves."""
    model.recorded = {}
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(
                lambda router, _, given: model.recorded.update(
                    {router: torch.bincount(given[1].flatten(), minlength=EXPERTS).float()}
                )
            )


def test_loads_even_out_while_the_model_learns():
    model = uneven(balance_rate=0.01)
    worst, losses = loads_of_steps(model, 100)
    # Two experts a token: the most that one expert can have is 4 times the mean of 8.
    assert (worst[0] > 3).all()
    assert worst[-10:].mean() < 1.5
    assert losses[-1] < losses[0] - 0.3
    for module in model.modules():
        if isinstance(module, Router):
            assert module.balance.abs().max() > 0.05 and not module.load.any()

    alone = uneven(balance_rate=0.0)
    record(alone)
    worst, _ = loads_of_steps(alone, 100)
    assert worst[-10:].mean() > 2.5, "without the balance they stay uneven"


def test_the_bias_moves_by_the_sign_of_what_is_missing():
    model = uneven(balance_rate=0.25)
    router = next(module for module in model.modules() if isinstance(module, Router))
    router.load.copy_(torch.tensor([10, 4, 4, 4, 4, 4, 2, 0]))
    model.finish_step(Alone("cpu"))
    assert router.balance.tolist() == [-0.25, 0, 0, 0, 0, 0, 0.25, 0.25]
    assert not router.load.any()
    model.finish_step(Alone("cpu"))
    assert router.balance.tolist() == [-0.25, 0, 0, 0, 0, 0, 0.25, 0.25], "no tokens, no news"


def test_recomputed_blocks_move_the_bias_alike():
    plain, recomputed = uneven(balance_rate=0.01), uneven(balance_rate=0.01)
    for block in recomputed.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    tokens = torch.randint(VOCAB, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    for model in (plain, recomputed):
        model(tokens).square().sum().backward()
        model.finish_step(Alone("cpu"))
    for one, other in zip(plain.buffers(), recomputed.buffers(), strict=True):
        assert torch.equal(one, other)
    assert any(buffer.any() for buffer in plain.buffers())


@pytest.mark.parametrize("layers", [(), (0, 1)])
def test_a_model_without_routers_asks_nothing_of_the_world(layers):
    mixture = MixtureOfExperts(experts=4, experts_per_token=1, intermediate_size=8, dense_layers=layers, balance_rate=0)
    decoder("nano", feedforward=mixture).finish_step(None)
