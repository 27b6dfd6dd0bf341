"""The loss where ranks share the head by vocabulary, against torch's cross entropy over the whole of it.

Ranks are threads that meet at barriers.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Batch, VocabularyShard
from modalities_models.coca import CoCaOutput
from modalities_models.head import Head
from modalities_models.losses import CrossEntropy
from modalities_models.losses import liger as liger_module
from modalities_models.losses.coca import CoCaLoss
from modalities_models.losses.projection import projection

B, T, D, V = 2, 9, 16, 21
SECONDS = 30
OBJECTIVES = [{}, {"label_smoothing": 0.2}, {"z_loss": 1e-2}, {"label_smoothing": 0.1, "z_loss": 1e-3}]


class Meeting:
    """Where the threads of one group reduce, and how often they did."""

    def __init__(self, ranks):
        self.barrier, self.values, self.calls = threading.Barrier(ranks, timeout=SECONDS), [None] * ranks, []

    def reduce(self, rank, values, operation):
        self.values[rank] = values.clone()
        self.barrier.wait()
        values.copy_(operation(torch.stack(self.values), 0))
        self.barrier.wait()
        self.calls.append((operation.__name__, tuple(values.shape)))
        return values


class Shard:
    def __init__(self, meeting, rank, first):
        self.meeting, self.rank, self.first = meeting, rank, first

    def sum_(self, values):
        return self.meeting.reduce(self.rank, values, torch.sum)

    def max_(self, values):
        return self.meeting.reduce(self.rank, values, torch.amax)


class Gathered(torch.autograd.Function):
    """All ranks' columns; backward, this rank's."""

    @staticmethod
    def forward(ctx, own, shard, rows):
        whole = own.new_zeros(*own.shape[:-1], rows)
        ctx.own = slice(shard.first, shard.first + own.shape[-1])
        whole[..., ctx.own] = own
        return shard.sum_(whole)

    @staticmethod
    def backward(ctx, gradient):
        return gradient[..., ctx.own], None, None


class SharedHead(Head):
    """This rank's rows; called, the logits of all, as tensor parallelism makes of a head."""

    def __init__(self, weight, shard, rows, vocab_size, **options):
        super().__init__(vocab_size, **options)
        self.weight, self.vocabulary_shard, self.rows = nn.Parameter(weight.clone()), shard, rows

    def forward(self, hidden):
        logits = F.linear(hidden * self.multiplier, self.weight)
        logits = logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
        return Gathered.apply(logits, self.vocabulary_shard, self.rows)[..., : self.vocab_size]

    forward.gathers_vocabulary = True


class UnknownHead(SharedHead):
    """Of a class that does more than a loss could know, here by doing nothing else."""

    def forward(self, hidden):
        return super().forward(hidden)


class SharedLinear(nn.Linear):
    def __init__(self, weight, shard, rows, vocab_size):
        assert rows == vocab_size
        super().__init__(weight.shape[1], vocab_size, bias=False, device="meta")
        self.weight, self.vocabulary_shard = nn.Parameter(weight.clone()), shard

    def forward(self, input):
        return Gathered.apply(super().forward(input), self.vocabulary_shard, self.out_features)

    forward.gathers_vocabulary = True


def case(rows=V, dtype=torch.float32, weighted=True):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=draw, dtype=torch.float64).to(dtype)
    weight = torch.randn(rows, D, generator=draw, dtype=torch.float64).to(dtype)
    targets = torch.randint(V, (B, T), generator=draw)
    weights = torch.rand(B, T, generator=draw) * (torch.rand(B, T, generator=draw) < 0.7) if weighted else None
    return hidden, weight, Batch(targets, targets, weights)


def reference(hidden, weight, batch, multiplier=1.0, softcap=None, label_smoothing=0.0, z_loss=0.0):
    """torch's cross entropy with smoothing, and PaLM's z-loss as published, in float64: value and gradients."""
    hidden, weight = (value.double().clone().requires_grad_() for value in (hidden, weight))
    logits = multiplier * (hidden @ weight[:V].T).flatten(0, 1)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, batch.targets_BT.flatten(), reduction="none", label_smoothing=label_smoothing)
    losses = losses + z_loss * logits.exp().sum(1).log() ** 2
    value = losses.sum() if batch.weights_BT is None else (losses * batch.weights_BT.flatten()).sum()
    return value.detach(), *torch.autograd.grad(value, [hidden, weight])


def shared(loss, weight, sizes, work, kind=SharedHead, **options):
    """``work(head, loss)`` on one thread per part of the weight's rows; what they returned, and their meeting."""
    meeting = Meeting(len(sizes))

    def run(rank):
        shard = Shard(meeting, rank, sum(sizes[:rank]))
        try:
            return work(kind(weight.split(sizes)[rank], shard, len(weight), V, **options), loss)
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(len(sizes)) as pool:
        ranks = [pool.submit(run, rank) for rank in range(len(sizes))]
    errors = [error for error in (rank.exception() for rank in ranks) if error is not None]
    # One that left first breaks the barrier for the others.
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [rank.result() for rank in ranks], meeting


def backward(hidden, batch):
    def work(head, loss):
        own = hidden.clone().requires_grad_()
        found = loss(own, head, batch)
        found.loss.backward()
        return found.loss.detach(), found.tokens, own.grad, head.weight.grad

    return work


def relative(ours, theirs):
    return ((ours.double() - theirs).norm() / theirs.norm()).item()


def assert_equals(results, wanted, tolerance, batch):
    value, hidden_gradient, weight_gradient = wanted
    tokens = B * T if batch.weights_BT is None else batch.weights_BT.sum().item()
    for found in results:
        assert found[0].item() == pytest.approx(value.item(), rel=min(1e-6, tolerance)), "the whole loss on every rank"
        assert found[1].item() == tokens
    assert relative(sum(found[2] for found in results), hidden_gradient) <= tolerance
    assert relative(torch.cat([found[3] for found in results]), weight_gradient) <= tolerance


@pytest.mark.parametrize("extra", OBJECTIVES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("chunk", [None, "auto", 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_parts_equal_torch_over_the_whole_vocabulary(dtype, tolerance, chunk, weighted, extra):
    hidden, weight, batch = case(dtype=dtype, weighted=weighted)
    results, _ = shared(CrossEntropy(chunk, **extra), weight, [11, 10], backward(hidden, batch))
    assert_equals(results, reference(hidden, weight, batch, **extra), tolerance, batch)


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [(24, [12, 12]), (32, [20, 12]), (32, [21, 11]), (32, [24, 8]), (32, [16, 16, 0]), (22, [6, 6, 6, 4])],
)
def test_padding_in_one_shard_or_filling_it_is_nobodys(rows, sizes):
    hidden, weight, batch = case(rows, torch.float64)
    options = {"multiplier": 0.5, "softcap": 2.0}
    extra = {"label_smoothing": 0.1, "z_loss": 1e-3}
    results, _ = shared(CrossEntropy(4, **extra), weight, sizes, backward(hidden, batch), **options)
    assert_equals(results, reference(hidden, weight, batch, **options, **extra), 1e-12, batch)
    gradient = torch.cat([found[3] for found in results])
    assert torch.equal(gradient[V:], torch.zeros(rows - V, D, dtype=torch.float64))


@pytest.mark.parametrize("kind", [SharedLinear, UnknownHead])
@pytest.mark.parametrize("chunk", [None, 4])
def test_linear_heads_take_part_and_unknown_ones_gather(chunk, kind):
    hidden, weight, batch = case(dtype=torch.float64)
    found = []

    def work(head, loss):
        found.append(projection(head, hidden) is not None)
        return backward(hidden, batch)(head, loss)

    results, meeting = shared(CrossEntropy(chunk, z_loss=1e-3), weight, [16, 5], work, kind)
    assert_equals(results, reference(hidden, weight, batch, z_loss=1e-3), 1e-12, batch)
    assert found == [kind is SharedLinear] * 2
    assert any(shape[-1] == V for _, shape in meeting.calls) == (kind is UnknownHead), "only calling the head gathers"


def test_the_sum_of_bfloat16_parts_is_near_the_whole():
    hidden, weight, batch = case(dtype=torch.bfloat16)
    results, _ = shared(CrossEntropy(4, label_smoothing=0.1), weight, [11, 10], backward(hidden, batch))
    wanted = reference(hidden, weight, batch, label_smoothing=0.1)
    assert results[0][0].dtype == torch.float32 and torch.equal(results[0][0], results[1][0])
    assert results[0][0].item() == pytest.approx(wanted[0].item(), rel=5e-3)
    assert relative(results[0][2] + results[1][2], wanted[1]) < 0.02
    assert relative(torch.cat([results[0][3], results[1][3]]), wanted[2]) < 0.02


@pytest.mark.parametrize("chunk", [None, 4])
def test_an_upstream_factor_and_several_micro_batches(chunk):
    hidden, weight, batch = case(dtype=torch.float64)

    def work(head, loss):
        own = hidden.clone().requires_grad_()
        total = 0.0
        for row in range(B):
            part = Batch(*(value[row : row + 1] for value in (batch.tokens_BT, batch.targets_BT, batch.weights_BT)))
            found = loss(own[row : row + 1], head, part)
            (found.loss * 3).backward()
            total = total + found.loss.detach()
        return total, batch.weights_BT.sum(), own.grad / 3, head.weight.grad / 3

    results, _ = shared(CrossEntropy(chunk), weight, [11, 10], work)
    assert_equals(results, reference(hidden, weight, batch), 1e-12, batch)


@pytest.mark.parametrize("chunk", [None, 4])
def test_what_is_evaluated_is_the_plain_cross_entropy_without_gradients(chunk):
    hidden, weight, batch = case(dtype=torch.float64)

    def work(head, loss):
        with torch.no_grad():
            return loss.evaluation(hidden, head, batch)

    results, meeting = shared(CrossEntropy(chunk, label_smoothing=0.2, z_loss=1e-2), weight, [11, 10], work)
    wanted = reference(hidden, weight, batch)[0].item()
    assert [found.loss.item() for found in results] == pytest.approx([wanted] * 2, rel=1e-12)
    assert all(shape[-1] == 1 for _, shape in meeting.calls)


def test_frozen_heads_and_inputs_cost_no_gradient():
    hidden, weight, batch = case(dtype=torch.float64)
    wanted = reference(hidden, weight, batch)

    def head_frozen(head, loss):
        head.weight.requires_grad_(False)
        return backward(hidden, batch)(head, loss)

    def hidden_frozen(head, loss):
        loss(hidden, head, batch).loss.backward()
        return head.weight.grad

    results, _ = shared(CrossEntropy(), weight, [11, 10], head_frozen)
    assert relative(results[0][2] + results[1][2], wanted[1]) < 1e-12 and results[0][3] is None
    results, _ = shared(CrossEntropy(), weight, [11, 10], hidden_frozen)
    assert relative(torch.cat(results), wanted[2]) < 1e-12


@pytest.mark.parametrize("extra", OBJECTIVES)
def test_a_chunk_costs_two_reductions_of_a_few_numbers_per_token(extra):
    hidden, weight, batch = case()
    _, meeting = shared(CrossEntropy(6, **extra), weight, [11, 10], backward(hidden, batch))
    sums = 3 if "label_smoothing" in extra else 2
    assert sorted(meeting.calls) == [("amax", (6, 1))] * 6 + [("sum", (sums, 6, 1))] * 6


@pytest.mark.parametrize("target", [-100, -1, V, V + 1])
def test_a_target_outside_the_vocabulary_is_not_taken_for_another_ranks(target):
    hidden, weight, batch = case(24)
    batch.targets_BT[0, 0] = target
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        shared(CrossEntropy(4), weight, [12, 12], backward(hidden, batch))


def test_losses_that_need_the_whole_head_say_so(monkeypatch):
    hidden, weight, batch = case()
    shard: VocabularyShard = Shard(Meeting(1), 0, 0)
    head = SharedHead(weight, shard, V, V)
    monkeypatch.setattr(liger_module, "version", lambda name: "1.0")
    with pytest.raises(ConfigError, match="liger_cross_entropy needs the whole head") as caught:
        liger_module.LigerCrossEntropy()(hidden, head, batch)
    assert "loss.cross_entropy" in caught.value.hint and "tp" in caught.value.hint
    with pytest.raises(ConfigError, match=r"loss\.coca .* tensor parallelism"):
        CoCaLoss(None)(CoCaOutput(hidden, hidden[:, 0], hidden[:, 0], torch.ones(1)), head, batch)
