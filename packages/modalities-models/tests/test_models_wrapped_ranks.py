"""Wrapped models of transformers sharded by FSDP2 over two processes against the whole ones."""

from __future__ import annotations

import pytest

pytest.importorskip("torch.distributed.fsdp", reason="needs FSDP2")
pytest.importorskip("transformers")

RANK = """
import os, sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from modalities_core.interfaces import Batch
from modalities_models.huggingface.wrapped import huggingface
from modalities_models.losses import CrossEntropy

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
SIZES = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=16)
WIDE = SIZES | dict(intermediate_size=48, num_key_value_heads=2)
CASES = {
    "llama": WIDE | dict(pad_token_id=None),
    "gpt2": SIZES | dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "gemma2": WIDE | dict(head_dim=8, final_logit_softcapping=2.0),
    "mixtral": WIDE | dict(num_local_experts=4),
    "phi": WIDE,
}
tokens = torch.randint(61, (4, 9), generator=torch.Generator().manual_seed(0))
segments = (torch.arange(8) >= 3).int().expand(4, 8)


def backward(model, rows):
    model.train()
    batch = Batch(tokens[rows, :-1], tokens[rows, 1:], None, segments[rows])
    hidden = model(batch.tokens_BT, segments_BT=batch.segments_BT)
    result = CrossEntropy(chunk_tokens=5)(hidden, model.head, batch)
    result.loss.backward()
    return result


def sharded(build, policy):
    with torch.device("meta"):
        model = build()
    place = model.parallel_plan().blocks[0].removesuffix(".*")
    blocks = list(model.get_submodule(place).children())
    assert len(blocks) == 2
    for block in blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy, reshard_after_forward=False)
    model.to_empty(device="cpu")
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, values in model.initial_values():
            target = tensors.pop(name)
            if hasattr(target, "placements"):
                values = distribute_tensor(values, target.device_mesh, target.placements, src_data_rank=None)
            target.copy_(values)
    assert not tensors
    return model


def compare(kind, policy, tolerance):
    build = lambda: huggingface(model_type=kind, config=CASES[kind], seed=2)
    whole = build()
    model = sharded(build, policy)
    for name, parameter in whole.named_parameters():
        assert torch.equal(model.get_parameter(name).full_tensor(), parameter), name
    wanted = backward(whole, slice(0, 4))
    mine = backward(model, slice(2 * rank, 2 * rank + 2))
    total = mine.loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, wanted.loss.detach(), rtol=tolerance, atol=0)
    largest = max(parameter.grad.norm() for parameter in whole.parameters() if parameter.grad is not None)
    for name, parameter in whole.named_parameters():
        if parameter.grad is None:
            continue
        got = 2 * model.get_parameter(name).grad.full_tensor()
        assert (got - parameter.grad).norm() <= tolerance * max(parameter.grad.norm(), largest / 100), (kind, name)


for kind in CASES:
    compare(kind, MixedPrecisionPolicy(), 2e-5)
for kind in ("llama", "gpt2", "phi"):
    compare(kind, MixedPrecisionPolicy(torch.bfloat16, torch.float32), 0.06)
dist.barrier()
dist.destroy_process_group()
print("equal", flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_sharded_over_two_processes_equals_whole(on_two_ranks):
    on_two_ranks(RANK)
