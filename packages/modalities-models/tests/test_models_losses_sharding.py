"""The chunked loss where the head is a unit of FSDP2 of its own: its weight is whole only while it is called."""

from __future__ import annotations

import pytest

pytest.importorskip("torch.distributed.fsdp", reason="needs FSDP2")

RANK = """
import os, sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from modalities_core.interfaces import Batch
from modalities_models.decoder import decoder
from modalities_models.losses import CrossEntropy
from modalities_models.losses.projection import projection

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
ARGUMENTS = dict(vocab_size=61, sequence_length=8, hidden_size=32, layers=1, heads=4)
tokens = torch.randint(61, (4, 9), generator=torch.Generator().manual_seed(0))
weights = torch.rand(4, 8, generator=torch.Generator().manual_seed(1))


def backward(model, rows, chunk, known):
    batch = Batch(tokens[rows, :-1], tokens[rows, 1:], weights[rows])
    hidden = model(batch.tokens_BT)
    assert (projection(model.head, hidden) is not None) == known
    loss = CrossEntropy(chunk, z_loss=1e-3)(hidden, model.head, batch).loss
    loss.backward()
    return loss.detach()


whole = decoder(**ARGUMENTS)
wanted = backward(whole, slice(0, 4), None, True)
for reshard in (True, False):
    model = decoder(**ARGUMENTS)
    fully_shard(model.head, reshard_after_forward=reshard)
    fully_shard(model)
    for _ in range(2):  # a second pass may find what the first left behind
        model.zero_grad()
        total = backward(model, slice(2 * rank, 2 * rank + 2), 5, False)
        dist.all_reduce(total)
        torch.testing.assert_close(total, wanted)
        for name, parameter in whole.named_parameters():
            got = 2 * model.get_parameter(name).grad.full_tensor()  # FSDP2 averages over ranks
            assert (got - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name
dist.barrier()
dist.destroy_process_group()
print("equal", flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_a_head_sharded_by_itself_is_called(on_two_ranks):
    on_two_ranks(RANK)
