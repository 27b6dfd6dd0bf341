"""The chunked loss: every kind of head, its precision, and the memory it takes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modalities_core.interfaces import Batch
from modalities_models.head import LinearHead, TiedHead
from modalities_models.losses import CrossEntropy
from modalities_models.losses.projection import projection

B, T, D, V = 2, 9, 16, 21
OBJECTIVES = [{}, {"label_smoothing": 0.1, "z_loss": 1e-2}]


class Biased(nn.Module):
    """A head that is not ours, as a plugin may have."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(V, D)), nn.Parameter(torch.zeros(V))

    def forward(self, hidden):
        return hidden @ self.weight.T + self.bias


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def heads():
    return {
        "linear": nn.Linear(D, V, bias=False),
        "own": LinearHead(V, D, V),
        "padded": LinearHead(32, D, V),
        "multiplied": LinearHead(V, D, V, multiplier=0.25),
        "capped": LinearHead(V, D, V, softcap=2.0),
        "all": LinearHead(24, D, V, multiplier=3.0, softcap=1.5),
        "tied": TiedHead(nn.Embedding(24, D), V, softcap=30.0),
        "biased": Biased(),
        "doubled": Doubled(D, V, bias=False),
        "with bias": nn.Linear(D, V),
    }


def case(name, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    head = heads()[name].to(dtype)
    if isinstance(head, TiedHead):
        head._embedding[0].to(dtype)  # it is the model's, not the head's
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
        if getattr(head, "bias", None) is not None:
            head.bias.copy_(torch.randn(V, generator=generator))
    targets = torch.randint(V, (B, T), generator=generator)
    weights = torch.rand(B, T, generator=generator) * (torch.rand(B, T, generator=generator) < 0.7)
    return hidden, head, Batch(targets, targets, weights)


def relative(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.mark.parametrize("extra", OBJECTIVES)
@pytest.mark.parametrize("name", heads())
def test_chunks_equal_the_dense_loss_in_float64(name, extra):
    hidden, head, batch = case(name)
    exact, head64, _ = case(name, torch.float64)
    wanted = CrossEntropy(**extra)(exact, head64, batch).loss
    wanted_gradients = torch.autograd.grad(wanted, [exact, head64.weight])
    loss = CrossEntropy(4, **extra)(hidden, head, batch).loss
    gradients = torch.autograd.grad(loss, [hidden, head.weight])
    assert abs(loss.item() - wanted.item()) <= 1e-6 * abs(wanted.item())
    for ours, theirs in zip(gradients, wanted_gradients, strict=True):
        assert relative(ours, theirs) <= 1e-5


def test_padded_rows_get_no_gradient():
    hidden, head, batch = case("padded")
    CrossEntropy(4)(hidden, head, batch).loss.backward()
    assert head.weight.grad.shape == (32, D)
    assert torch.equal(head.weight.grad[V:], torch.zeros(32 - V, D))
    assert head.weight.grad[:V].abs().sum() > 0


@pytest.mark.parametrize("name", heads())
def test_known_heads_are_exactly_those_whose_result_a_matrix_explains(name):
    _, head, _ = case(name)
    assert (projection(head, torch.zeros(1, D)) is None) == (name in ("biased", "doubled", "with bias"))


def test_a_head_somebody_listens_to_is_called():
    hidden, head, batch = case("own")
    wanted = CrossEntropy(4)(hidden, head, batch).loss.item()
    head.register_forward_hook(lambda module, inputs, output: output * 0)
    assert CrossEntropy(4)(hidden, head, batch).loss.item() != wanted


def test_a_replaced_forward_is_called():
    hidden, head, batch = case("own")
    head.forward = lambda hidden: F.linear(hidden, 2 * head.weight)
    dense, chunked = CrossEntropy()(hidden, head, batch).loss, CrossEntropy(4)(hidden, head, batch).loss
    torch.testing.assert_close(chunked, dense)


@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_only_what_is_trained_gets_a_gradient(frozen):
    hidden, head, batch = case("own")
    CrossEntropy()(hidden, head, batch).loss.backward()
    wanted = hidden.grad if frozen == "head" else head.weight.grad
    hidden.grad = head.weight.grad = None
    (head.weight if frozen == "head" else hidden).requires_grad_(False)
    CrossEntropy(4)(hidden, head, batch).loss.backward()
    got = hidden.grad if frozen == "head" else head.weight.grad
    torch.testing.assert_close(got, wanted)
    assert (head.weight.grad if frozen == "head" else hidden.grad) is None


def test_an_upstream_factor_multiplies_the_gradients():
    hidden, head, batch = case("all", torch.float64)
    dense = torch.autograd.grad(CrossEntropy()(hidden, head, batch).loss * 0.3, [hidden, head.weight])
    chunked = torch.autograd.grad(CrossEntropy(4)(hidden, head, batch).loss * 0.3, [hidden, head.weight])
    for ours, theirs in zip(chunked, dense, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_add_up_over_micro_batches():
    hidden, head, batch = case("own", torch.float64)
    CrossEntropy()(hidden, head, batch).loss.backward()
    wanted = head.weight.grad
    head.weight.grad = None
    for row in range(B):
        part = Batch(*(value[row : row + 1] for value in (batch.tokens_BT, batch.targets_BT, batch.weights_BT)))
        CrossEntropy(4)(hidden[row : row + 1], head, part).loss.backward()
    torch.testing.assert_close(head.weight.grad, wanted)


def test_a_second_backward_pass_is_an_error_and_never_a_wrong_gradient():
    hidden, head, batch = case("own")
    loss = CrossEntropy(4)(hidden, head, batch).loss
    loss.backward(torch.tensor(2.0), retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["own", "all", "biased"])
def test_without_gradients_the_value_is_the_same(name):
    hidden, head, batch = case(name)
    wanted = CrossEntropy(4)(hidden, head, batch).loss.item()
    with torch.no_grad():
        assert CrossEntropy(4)(hidden, head, batch).loss.item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("name", ["linear", "all", "tied"])
def test_bfloat16_autocast_computes_what_the_dense_loss_computes(name):
    hidden, head, batch = case(name)
    results = []
    for chunk in (None, 4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = CrossEntropy(chunk)(hidden, head, batch).loss
        results.append((loss, *torch.autograd.grad(loss, [hidden, head.weight])))
    (dense, *dense_gradients), (chunked, *gradients) = results
    assert chunked.dtype == torch.float32
    # The soft cap is bfloat16 in the head and float32 in chunks.
    assert chunked.item() == pytest.approx(dense.item(), rel=1e-6 if name == "linear" else 5e-3)
    for ours, theirs in zip(gradients, dense_gradients, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        assert relative(ours, theirs) < 0.02


def test_bfloat16_weights_are_summed_in_float32():
    """4,096 chunks of one token each: a bfloat16 sum would stop growing at 256 times what is added."""
    hidden = torch.ones(1, 4096, 1, dtype=torch.bfloat16, requires_grad=True)
    head = nn.Linear(1, 2, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(head.weight)
    targets = torch.zeros(1, 4096, dtype=torch.int64)
    CrossEntropy(1)(hidden, head, Batch(targets, targets)).loss.backward()
    assert head.weight.grad.flatten().tolist() == [-2048, 2048]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_chunks_equal_the_dense_loss_on_a_gpu(dtype, tolerance, autocast, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    torch.manual_seed(0)
    hidden = torch.randn(2, 300, 64, device="cuda").to(dtype).requires_grad_()
    head = LinearHead(1024, 64, 1000, multiplier=0.5, softcap=20.0).to("cuda", dtype)
    nn.init.normal_(head.weight, std=0.3)
    targets = torch.randint(1000, (2, 300), device="cuda")
    batch = Batch(targets, targets, torch.rand(2, 300, device="cuda"))
    results = []
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast), torch.cuda.device(0):
        for chunk in (None, 128):
            loss = CrossEntropy(chunk, label_smoothing=0.1, z_loss=1e-3)(hidden, head, batch).loss
            results.append((loss, *torch.autograd.grad(loss, [hidden, head.weight])))
    for ours, theirs in zip(*results, strict=True):
        assert relative(ours, theirs) <= (2e-2 if autocast else tolerance)


PEAK = """
import re, sys
from pathlib import Path
import torch
from modalities_core.interfaces import Batch
from modalities_models.head import LinearHead
from modalities_models.losses import CrossEntropy

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
kind, tokens, chunk = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) or None
vocabulary, width = 131072, 8
head = LinearHead(vocabulary, width, vocabulary) if kind == "known" else torch.nn.Linear(width, vocabulary)
head.weight.data.normal_()
def step(tokens, chunk):
    hidden = torch.randn(1, tokens, width, requires_grad=True)
    targets = torch.randint(vocabulary, (1, tokens))
    CrossEntropy(chunk)(hidden, head, Batch(targets, targets)).loss.backward()
step(2, 1)  # loads what is loaded once, and the gradient of the weight
before = peak()
step(tokens, chunk)
print((peak() - before) / (tokens * vocabulary * 4))
"""


def peak_over_logits(*arguments: object) -> float:
    """How much more memory a step takes at its peak than before it, as a share of the float32 logits."""
    # A fixed threshold returns every freed block to the system: the peak is then that of live memory.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PEAK, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak from /proc")
def test_at_vocabulary_128k_a_chunk_takes_less_than_a_tenth_of_the_logits():
    assert peak_over_logits("known", 128, 0) > 1, "the dense loss holds them all: the measure sees it"
    assert peak_over_logits("known", 512, 16) < 0.1
    assert peak_over_logits("called", 512, 16) < 0.1
