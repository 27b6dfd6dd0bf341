"""The loss against torch's cross entropy in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Batch
from modalities_models.head import LinearHead
from modalities_models.losses import CrossEntropy
from modalities_models.losses.cross_entropy import automatic_chunk

B, T, D, V = 3, 7, 10, 23


def case(dtype=torch.float64, weighted=True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    head = nn.Linear(D, V, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, D, generator=generator, dtype=torch.float64))
    targets = torch.randint(V, (B, T), generator=generator)
    weights = torch.rand(B, T, generator=generator).mul(3).floor() / 2 if weighted else None
    return hidden, head, Batch(torch.zeros_like(targets), targets, weights)


def reference(hidden, head, batch, label_smoothing=0.0, z_loss=0.0):
    """torch's cross entropy with smoothing, and PaLM's z-loss as it is published, in float64."""
    logits = (hidden.double() @ head.weight.double().T).flatten(0, 1)
    losses = F.cross_entropy(logits, batch.targets_BT.flatten(), reduction="none", label_smoothing=label_smoothing)
    losses = losses + z_loss * logits.exp().sum(1).log() ** 2
    return losses.sum() if batch.weights_BT is None else (losses * batch.weights_BT.flatten()).sum()


@pytest.mark.parametrize(
    "extra", [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"label_smoothing": 0.3, "z_loss": 1e-3}]
)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("chunk", [None, 1, 4, 21, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_value_and_gradients_equal_torch(weighted, chunk, dtype, tolerance, extra):
    hidden, head, batch = case(dtype, weighted)
    wanted = torch.autograd.grad(reference(hidden, head, batch, **extra), [hidden, head.weight])
    loss, tokens = CrossEntropy(chunk, **extra)(hidden, head, batch)
    got = torch.autograd.grad(loss, [hidden, head.weight])
    assert loss.item() == pytest.approx(reference(hidden, head, batch, **extra).item(), rel=tolerance)
    assert tokens.item() == (B * T if batch.weights_BT is None else batch.weights_BT.sum().item())
    assert tokens.dtype == torch.float32 and not tokens.requires_grad
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).norm() <= 10 * tolerance * theirs.norm()


@pytest.mark.parametrize("chunk", [None, 4])
def test_what_is_evaluated_is_the_plain_cross_entropy(chunk):
    hidden, head, batch = case()
    loss = CrossEntropy(chunk, label_smoothing=0.2, z_loss=1e-2)
    assert loss.evaluation.chunk_tokens == chunk
    plain = reference(hidden, head, batch).item()
    assert loss.evaluation(hidden, head, batch).loss.item() == pytest.approx(plain, rel=1e-13)
    assert loss(hidden, head, batch).loss.item() > plain + 1


@pytest.mark.parametrize("chunk", [None, 4])
def test_weights_of_zero_give_zero_loss_and_zero_gradients(chunk):
    hidden, head, batch = case()
    batch = Batch(batch.tokens_BT, batch.targets_BT, torch.zeros(B, T))
    loss, tokens = CrossEntropy(chunk)(hidden, head, batch)
    loss.backward()
    assert loss.item() == 0 and tokens.item() == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))


def test_weighted_by_ones_equals_unweighted():
    hidden, head, batch = case(weighted=False)
    ones = Batch(batch.tokens_BT, batch.targets_BT, torch.ones(B, T))
    assert CrossEntropy()(hidden, head, ones).loss.item() == pytest.approx(
        CrossEntropy()(hidden, head, batch).loss.item(), rel=1e-14
    )


def test_sums_do_not_depend_on_the_split_into_micro_batches():
    hidden, head, batch = case()
    whole = CrossEntropy()(hidden, head, batch)
    parts = [
        CrossEntropy()(
            hidden[i : i + 1],
            head,
            Batch(*(t[i : i + 1] for t in (batch.tokens_BT, batch.targets_BT)), batch.weights_BT[i : i + 1]),
        )
        for i in range(B)
    ]
    assert sum(part.loss.item() for part in parts) == pytest.approx(whole.loss.item(), rel=1e-13)
    assert sum(part.tokens.item() for part in parts) == whole.tokens.item()


@pytest.mark.parametrize("chunk", [None, 4])
def test_log_softmax_is_float32_under_bfloat16_autocast(chunk):
    hidden, head, batch = case(torch.float32, weighted=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = CrossEntropy(chunk)(hidden, head, batch).loss
        logits = head(hidden)
    loss.backward()
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    wanted = F.cross_entropy(logits.double().flatten(0, 1), batch.targets_BT.flatten(), reduction="sum")
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    _, head, batch = case(weighted=False)
    loss, tokens = CrossEntropy()(torch.zeros(B, T, D, dtype=torch.float64), head, batch)
    assert loss.item() / tokens.item() == pytest.approx(math.log(V), rel=1e-12)


def test_logits_never_exist_whole_when_chunked():
    hidden, head, batch = case()
    shapes = []
    head.register_forward_hook(lambda *call: shapes.append(call[2].shape))
    CrossEntropy(4)(hidden, head, batch).loss.backward()
    assert {tuple(shape) for shape in shapes} == {(4, V), (1, V)}
    assert len(shapes) == 2 * 6, "each chunk once forward and once again for the backward pass"


@pytest.mark.parametrize("target", [-100, -1, V])
@pytest.mark.parametrize("weighted", [True, False])
def test_a_target_outside_the_vocabulary_is_never_skipped(target, weighted):
    hidden, head, batch = case(weighted=weighted)
    batch.targets_BT[0, 0] = target
    with pytest.raises(IndexError, match="out of bounds"):
        CrossEntropy()(hidden, head, batch)


@pytest.mark.parametrize("target", [-100, -1, V])
@pytest.mark.parametrize("weight", [None, 1.0, 0.0])
def test_a_target_outside_the_vocabulary_is_not_skipped_in_chunks_either(target, weight):
    hidden, head, batch = case()
    batch = Batch(batch.tokens_BT, batch.targets_BT, None if weight is None else torch.full((B, T), weight))
    batch.targets_BT[0, 0] = target
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        CrossEntropy(4)(hidden, head, batch)


@pytest.mark.parametrize(
    "wrong",
    [
        {"chunk_tokens": 0},
        {"chunk_tokens": "most"},
        {"label_smoothing": 1.0},
        {"label_smoothing": -0.1},
        {"z_loss": -1e-4},
        {"z_loss": math.nan},
    ],
)
def test_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        CrossEntropy(**wrong)


def test_automatic_chunks_on_the_cpu_equal_the_whole():
    tokens = torch.randint(11, (2, 700), generator=torch.Generator().manual_seed(0))
    hidden, batch = torch.randn(2, 700, 8, requires_grad=True), Batch(tokens, tokens)
    results = []
    for chunk in ("auto", None):
        sizes, head = [], LinearHead(11, 8, 11)
        with torch.no_grad():
            head.weight.copy_(torch.arange(88).reshape(11, 8) / 88)
        loss = CrossEntropy() if chunk == "auto" else CrossEntropy(chunk)
        objective = loss.objective
        one = type(objective).differentiate_

        def noted(self, logits, *rest, sizes=sizes, one=one):
            sizes.append(len(logits))
            return one(self, logits, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(objective), "differentiate_", noted)
            value = loss(hidden, head, batch).loss
        results.append((value, *torch.autograd.grad(value, (hidden, head.weight)), sizes))
    (value, *gradients, sizes), (whole, *wanted, none) = results
    assert sizes == [512, 512, 376] and none == []
    torch.testing.assert_close(value, whole)
    for mine, exact in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("vocabulary", "tokens", "size"),
    [
        (32_000, 8192, 8388),
        (32_000, 16_384, 8192),
        (131_072, 65_536, 2048),
        (500_000, 4096, 1024),
        (50_304, 5400, 2700),
    ],
)
def test_automatic_chunks_elsewhere_have_a_gibibyte_of_logits(vocabulary, tokens, size):
    with torch.device("meta"):
        assert automatic_chunk(torch.empty(tokens, 8), LinearHead(vocabulary, 8, vocabulary)) == size


def test_a_model_without_storage_has_a_loss_without_a_value():
    with torch.device("meta"):
        hidden, tokens = torch.empty(2, 700, 8, requires_grad=True), torch.empty(2, 700, dtype=torch.int64)
        loss = CrossEntropy(512)(hidden, LinearHead(11, 8, 11), Batch(tokens, tokens)).loss
        loss.backward()
    assert loss.shape == () and hidden.grad is not None and hidden.grad.shape == (2, 700, 8)


def test_heads_that_have_to_be_called_are_called_once():
    calls = []
    head = nn.Linear(8, 11, bias=False)
    head.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    tokens = torch.zeros(2, 700, dtype=torch.int64)
    CrossEntropy()(torch.randn(2, 700, 8), head, Batch(tokens, tokens)).loss.backward()
    assert calls == [1400]
