"""The loss where two processes share the head by vocabulary, against the unsharded loss and torch in float64."""

from __future__ import annotations

import pytest

RANK = '''
import sys
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from modalities_core.interfaces import Batch
from modalities_models.head import LinearHead
from modalities_models.losses import CrossEntropy

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
D, V, R, N = 16, 61, 64, 40


class Shard:
    first = 32 * rank

    def sum_(self, values):
        dist.all_reduce(values)
        return values

    def max_(self, values):
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values


class Shapes(TorchDispatchMode):
    """Notes how large the tensors are that operators give."""

    def __init__(self):
        super().__init__()
        self.elements, self.widest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for value in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(value, torch.Tensor) and value.ndim > 1:
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
                self.widest = max(self.widest, *value.shape)
        return found


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


draw = torch.Generator().manual_seed(0)
whole = torch.randn(R, D, generator=draw, dtype=torch.float64)
states = torch.randn(2, N // 2, D, generator=draw, dtype=torch.float64)
targets = torch.randint(V, (2, N // 2), generator=draw)
batch = Batch(targets, targets, torch.rand(2, N // 2, generator=draw))
for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
    for extra in ({}, {"label_smoothing": 0.1, "z_loss": 1e-3}):
        for chunk in (None, 7):
            one = LinearHead(R, D, V).to(dtype)
            one.weight.data.copy_(whole)
            alone = states.to(dtype, copy=True).requires_grad_()
            wanted = CrossEntropy(chunk, **extra)(alone, one, batch).loss
            wanted.backward()
            head = LinearHead(32, D, V).to(dtype)
            head.vocabulary_shard = Shard()
            head.weight.data.copy_(whole[32 * rank : 32 * rank + 32])
            hidden = states.to(dtype, copy=True).requires_grad_()
            loss = CrossEntropy(chunk, **extra)(hidden, head, batch).loss
            loss.backward()
            assert abs(loss.item() / wanted.item() - 1) < min(1e-6, tolerance)
            assert relative(head.weight.grad, one.weight.grad[32 * rank : 32 * rank + 32]) < tolerance
            dist.all_reduce(hidden.grad)
            assert relative(hidden.grad, alone.grad) < tolerance
            if not extra:
                logits = (states @ whole[:V].T).flatten(0, 1)
                losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
                exact = losses @ batch.weights_BT.flatten().double()
                assert abs(loss.item() / exact.item() - 1) < min(1e-6, tolerance)
                with torch.no_grad():
                    value = CrossEntropy(chunk)(hidden, head, batch).loss
                assert abs(value.item() / exact.item() - 1) < min(1e-6, tolerance)

V, N = 1024, 30
weight, states = torch.randn(V, 4, generator=draw), torch.randn(1, N, 4, generator=draw)
targets = torch.randint(V, (1, N), generator=draw)
wanted = F.cross_entropy((states @ weight.T)[0], targets[0], reduction="sum", label_smoothing=0.1).item()
for training in (True, False):
    for chunk in (None, 6):
        head = LinearHead(V // 2, 4, V)
        head.vocabulary_shard = Shard()
        head.vocabulary_shard.first = rank * V // 2
        head.weight.data.copy_(weight.chunk(2)[rank])
        with torch.set_grad_enabled(training), Shapes() as shapes:
            hidden, batch = states.clone().requires_grad_(), Batch(targets, targets)
            loss = CrossEntropy(chunk, label_smoothing=0.1)(hidden, head, batch)
            if training:
                loss.loss.backward()
        assert abs(loss.loss.item() / wanted - 1) < 1e-5
        # Logits of all ids at once exist nowhere, not even of one token.
        assert shapes.widest == V // 2 and shapes.elements == max((chunk or N) * V // 2, 4 * V // 2), vars(shapes)
dist.barrier()
dist.destroy_process_group()
print("equal", flush=True)
'''


@pytest.mark.slow
def test_two_processes_equal_the_loss_of_one(on_two_ranks):
    on_two_ranks(RANK)
