"""Recomputation of our decoder: memory falls as predicted, and what it trains is what it trains without."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modalities_core.interfaces import Batch
from modalities_core.training.executor import Plain
from modalities_core.training.world import Alone
from modalities_models.decoder import decoder
from modalities_models.losses.cross_entropy import CrossEntropy
from modalities_models.nn.mixture_of_experts import MixtureOfExperts
from modalities_models.recomputation import kept_per_token
from modalities_parallel.recomputation import selective, whole_blocks

CPU = Alone("cpu")
WRAPPED = {
    ("none", None): lambda model: model,
    ("blocks", None): whole_blocks,
    ("blocks", 2): lambda model: whole_blocks(model, every=2),
    ("selective", None): lambda model: selective(model, every=None),
    ("selective", 2): selective,
}
EXPERTS = MixtureOfExperts(experts=4, experts_per_token=2, intermediate_size=48, shared_intermediate_size=32)


class Made(TorchDispatchMode):
    """Notes the memory that operations make, whoever keeps it: autograd, a cache or a closure."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self._storages[reference.cdata] = (reference, storage.nbytes())
        return made

    def alive(self) -> int:
        gc.collect()
        return sum(size for reference, size in self._storages.values() if not reference.expired())


def built(**options):
    sizes = {"vocab_size": 97, "sequence_length": 64, "hidden_size": 64, "heads": 4, "attention": "sdpa"}
    return decoder(**sizes | {"layers": 4, "key_value_heads": 2} | options)


def kept_bytes(model) -> int:
    """What is alive between forward and backward."""
    tokens_BT = torch.zeros((4, 64), dtype=torch.int64)
    with Made() as made:
        hidden_BTD = model(tokens_BT)
        alive = made.alive()
    hidden_BTD.sum().backward()
    return alive


@pytest.mark.parametrize(
    "options", [{}, {"activation": "gelu"}, {"feedforward": EXPERTS}], ids=["llama", "gelu", "moe"]
)
@pytest.mark.parametrize("way", [way for way in WRAPPED if way[0] != "none"], ids=str)
def test_memory_falls_by_what_is_predicted(way, options):
    plain = built(**options)
    fall = kept_bytes(plain) - kept_bytes(WRAPPED[way](built(**options)))
    a = plain.architecture
    elements = sum(kept_per_token(a, n, "none") - kept_per_token(a, n, *way) for n in range(a.layers))
    assert fall == pytest.approx(4 * 256 * elements, rel=0.15)


def trained(model, precision):
    executor = Plain(model, CrossEntropy(), CPU, precision=precision)
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(4)
    losses = []
    for _ in range(2):
        tokens = torch.randint(0, 97, (2, 65), generator=generator)
        segments = (torch.arange(64) // 25).expand(2, -1).to(torch.int32)
        losses.append(executor.forward_backward([Batch(tokens[:, :-1], tokens[:, 1:], None, segments)]).loss)
    loads = [router.load for router in model._balanced]
    return losses + [value.grad for value in model.parameters()] + loads


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("way", [way for way in WRAPPED if way[0] != "none"], ids=str)
@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_documents_dropout_and_loads_of_experts_are_exact(way, precision, attention):
    options = {"dropout": 0.1, "feedforward": EXPERTS, "attention": attention, "query_key_norm": "head"}
    found, expected = trained(WRAPPED[way](built(**options)), precision), trained(built(**options), precision)
    assert all(torch.equal(ours, others) for ours, others in zip(found, expected, strict=True))


def test_caches_are_read_as_without_recomputation():
    plain, model = built().eval(), whole_blocks(built()).eval()
    tokens_BT = torch.arange(12)[None]
    caches = model.new_caches()
    parts = [model(part, caches=caches) for part in tokens_BT.split([7, 1, 4], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), plain(tokens_BT))
    assert caches[0].length == 12
