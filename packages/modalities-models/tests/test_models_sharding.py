"""The decoder sharded by FSDP2 over two processes against the whole one: built on meta, tied head, chunked loss."""

from __future__ import annotations

import pytest

pytest.importorskip("torch.distributed.fsdp", reason="needs FSDP2")

RANK = """
import os, sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from modalities_core.interfaces import Batch
from modalities_models.decoder import decoder
from modalities_models.losses import CrossEntropy
from modalities_models.nn.mixture_of_experts import MixtureOfExperts
from modalities_models.losses.projection import projection

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
ARGUMENTS = dict(vocab_size=61, sequence_length=8, hidden_size=32, layers=2, heads=4, key_value_heads=2)
tokens = torch.randint(61, (4, 9), generator=torch.Generator().manual_seed(0))
weights = torch.rand(4, 8, generator=torch.Generator().manual_seed(1))
# Five experts do not divide by two ranks: each of them has some whole ones.
MIXTURE = MixtureOfExperts(experts=5, experts_per_token=2, intermediate_size=24, shared_intermediate_size=8)
BLOCKS = {
    "rope": {},
    "absolute": dict(positions="absolute", norm="layer", bias=True),
    "gemma": dict(norm_placement="sandwich", activation="geglu", logit_softcap=4.0, vocab_multiple=16),
    "mixture": dict(norm_placement="post", query_key_norm="projection", feedforward=MIXTURE),
}


def backward(model, rows, chunk):
    batch = Batch(tokens[rows, :-1], tokens[rows, 1:], weights[rows])
    hidden = model(batch.tokens_BT)
    assert projection(model.head, hidden) is not None, "between forward and backward the head's weight is whole"
    result = CrossEntropy(chunk, label_smoothing=0.1, z_loss=1e-3)(hidden, model.head, batch)
    result.loss.backward()
    return result


def sharded(arguments, policy):
    with torch.device("meta"):
        model = decoder(**arguments)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, values in model.initial_values():
            if name in dict(model.named_buffers()):
                model.get_buffer(name).copy_(values)
                continue
            parameter = model.get_parameter(name)
            parameter.copy_(distribute_tensor(values, parameter.device_mesh, parameter.placements))
    return model


def compare(arguments, chunk, policy, tolerance):
    whole = decoder(**arguments)
    wanted = backward(whole, slice(0, 4), None)
    model = sharded(arguments, policy)
    assert model.parameter_count == whole.parameter_count
    for name, parameter in whole.named_parameters():
        assert torch.equal(model.get_parameter(name).full_tensor(), parameter), name
    mine = backward(model, slice(2 * rank, 2 * rank + 2), chunk)
    total = torch.stack([mine.loss.detach(), mine.tokens])
    dist.all_reduce(total)
    torch.testing.assert_close(total, torch.stack([wanted.loss.detach(), wanted.tokens]), rtol=tolerance, atol=0)
    for name, load in whole.named_buffers():
        if name.endswith("load"):
            counted = model.get_buffer(name).clone()
            dist.all_reduce(counted)
            assert torch.equal(counted, load) or policy is mixed, name
    largest = max(parameter.grad.norm() for parameter in whole.parameters())
    for name, parameter in whole.named_parameters():
        # FSDP2 averages over ranks; ours is the gradient of the sum.
        got = 2 * model.get_parameter(name).grad.full_tensor()
        # The key bias has none but rounding: the softmax does not see what shifts all its scores.
        bound = tolerance * max(parameter.grad.norm(), largest / 100)
        assert (got - parameter.grad).norm() <= bound, (name, arguments, chunk)


exact, mixed = MixedPrecisionPolicy(), MixedPrecisionPolicy(torch.bfloat16, torch.float32)
for tied in (True, False):
    for blocks in BLOCKS.values():
        arguments = ARGUMENTS | blocks | dict(tied_embeddings=tied)
        for chunk in (None, 5):
            compare(arguments, chunk, exact, 1e-5)
            compare(arguments, chunk, mixed, 0.05)
dist.barrier()
dist.destroy_process_group()
print("equal", flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_sharded_over_two_processes_equals_whole(on_two_ranks):
    on_two_ranks(RANK)
