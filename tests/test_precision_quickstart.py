"""The quick start's model in every precision: the same loss within noise after 200 steps."""

from __future__ import annotations

import pytest
import torch

from modalities_core.interfaces import Batch
from modalities_core.training.executor import Plain
from modalities_core.training.world import Alone
from modalities_models.decoder import decoder
from modalities_models.initialization import Scaled
from modalities_models.losses import CrossEntropy

VOCABULARY, LENGTH, SAMPLES, STEPS = 256, 64, 2, 200


def batches():
    """Sequences in which each token follows from the last two, but for a tenth that are random."""
    generator = torch.Generator().manual_seed(0)
    rule = torch.randint(VOCABULARY, (32, 32), generator=generator)
    for _ in range(STEPS):
        tokens = torch.randint(VOCABULARY, (SAMPLES, LENGTH + 1), generator=generator)
        noise = torch.rand(tokens.shape, generator=generator) < 0.1
        for place in range(2, LENGTH + 1):
            following = rule[tokens[:, place - 1] % 32, tokens[:, place - 2] % 32]
            tokens[:, place] = torch.where(noise[:, place], tokens[:, place], following)
        yield Batch(tokens[:, :-1], tokens[:, 1:])


def trained(precision: str) -> list[float]:
    model = decoder("quickstart", vocab_size=VOCABULARY, sequence_length=LENGTH, initialization=Scaled(0.06))
    plain = Plain(model, CrossEntropy(), Alone("cpu"), precision=precision)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    losses = []
    for batch in batches():
        sums = plain.forward_backward([batch])
        scale = sums.tokens if plain.scaler is None else sums.tokens * plain.scaler.scale
        for parameter in parameters:
            parameter.grad /= scale
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if norm.isfinite():
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if plain.scaler is not None:
            plain.scaler.update(~norm.isfinite())
        losses.append((sums.loss / sums.tokens).item())
    return losses


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_precision_reaches_the_loss_of_float32() -> None:
    exact = trained("fp32")
    assert exact[0] - sum(exact[-20:]) / 20 > 0.5
    for precision in ("bf16", "bf16_autocast", "fp16"):
        found = trained(precision)
        print(precision, sum(found[-20:]) / 20, "float32", sum(exact[-20:]) / 20)
        assert sum(found[-20:]) == pytest.approx(sum(exact[-20:]), rel=0.02), precision
