"""The chunked loss on a model built by parallel.fsdp2 in one process: it computes in the precision of its head."""

from __future__ import annotations

import pytest
import torch

from modalities_core.interfaces import Batch
from modalities_core.training.world import Alone
from modalities_models.decoder import decoder
from modalities_models.losses import CrossEntropy
from modalities_models.losses.projection import projection
from modalities_parallel.fsdp import fsdp2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_chunks_have_the_precision_of_the_head(dtype, tied) -> None:
    def build():
        return decoder("nano", vocab_size=300, sequence_length=32, layers=1, tied_embeddings=tied)

    tokens = torch.randint(300, (2, 33), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    results = []
    for chunk in (None, 16):
        model = fsdp2(build, Alone("cpu"), param_dtype=dtype)
        hidden = model(batch.tokens_BT)
        known = projection(model.head, hidden)
        assert known is not None and known.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        loss = CrossEntropy(chunk)(hidden, model.head, batch).loss
        loss.backward()
        results.append((loss.item(), {name: value.grad for name, value in model.named_parameters()}))
    (dense, wanted), (chunked, gradients) = results
    assert chunked == pytest.approx(dense, rel=1e-6)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert (gradient - wanted[name]).norm() <= (1e-5 if dtype == "fp32" else 0.02) * wanted[name].norm(), name
