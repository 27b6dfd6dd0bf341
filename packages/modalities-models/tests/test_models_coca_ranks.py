"""CoCa on two ranks, sharded by FSDP2, against one process with both halves of the batch."""

from __future__ import annotations

import pytest

pytest.importorskip("torch.distributed.fsdp", reason="needs FSDP2")

RANK = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from modalities_core.interfaces import Batch
from modalities_models.coca import CoCa
from modalities_models.initialization import Plain
from modalities_models.losses.coca import CoCaLoss, contrastive_loss
from modalities_models.vision import VisionTransformer

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)


class World:
    device = torch.device("cpu")

    def __init__(self, rank, size, data_rank, data_size):
        self.rank, self.size, self.data_rank, self.data_size = rank, size, data_rank, data_size

    def sum(self, values):
        if self.size > 1:
            dist.all_reduce(values)
        return values


def coca():
    vision = VisionTransformer(8, 4, 16, 2, 2, initialization=Plain(0.3))
    return CoCa(vision, 31, 6, 24, 1, 2, 3, 8, 4, initialization=Plain(0.3))


draw = torch.Generator().manual_seed(0)
tokens = torch.randint(1, 31, (6, 7), generator=draw)
weights = torch.rand(6, 6, generator=draw)
weights[4] = 0  # a row of padding, on the second rank
images = torch.randint(0, 256, (6, 3, 8, 8), generator=draw, dtype=torch.uint8)


def backward(model, rows, world):
    b = Batch(tokens[rows, :-1], tokens[rows, 1:], weights[rows], None, images[rows])
    result = CoCaLoss(world)(model(b.tokens_BT, images_BCHW=b.images_BCHW), model.head, b)
    result.loss.backward()
    return torch.stack([result.loss.detach(), result.tokens.double()])


one = coca()
wanted = backward(one, slice(0, 6), World(0, 1, 0, 1))
with torch.device("meta"):
    model = coca()
for block in (*model.vision.blocks, *model.text_blocks, *model.blocks):
    fully_shard(block)
fully_shard(model, reshard_after_forward=False)
model.to_empty(device="cpu")
with torch.no_grad():
    for name, values in model.initial_values():
        parameter = model.get_parameter(name)
        whole = one.get_parameter(name).detach()
        assert torch.equal(values.double(), whole), name
        parameter.copy_(distribute_tensor(values.double(), parameter.device_mesh, parameter.placements))
mine = backward(model, slice(3 * rank, 3 * rank + 3), World(rank, 2, rank, 2))
dist.all_reduce(mine)
torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=0)
largest = max(parameter.grad.norm() for parameter in one.parameters())
for name, parameter in one.named_parameters():
    # FSDP2 averages over ranks; ours is the gradient of the sum.
    got = 2 * model.get_parameter(name).grad.full_tensor()
    assert (got - parameter.grad).norm() <= 1e-6 * max(parameter.grad.norm(), largest / 1000), name

# Two ranks that see the same data, as under tensor parallelism, count it once.
values = torch.randn(2, 5, 8, generator=draw)
alone = values.clone().requires_grad_()
expected = contrastive_loss(*alone, torch.tensor([9.0]), torch.ones(5), World(0, 1, 0, 1))
(wanted,) = torch.autograd.grad(expected, alone)
same = values.clone().requires_grad_()
got = contrastive_loss(*same, torch.tensor([9.0]), torch.ones(5), World(rank, 2, 0, 1))
torch.testing.assert_close(got, expected)
torch.testing.assert_close(torch.autograd.grad(got, same)[0], wanted)
dist.destroy_process_group()
print("equal")
"""


def test_two_ranks_compute_what_one_does(on_two_ranks):
    on_two_ranks(RANK)
