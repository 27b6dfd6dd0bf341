"""Liger's kernel: refused in plain words where it cannot run, equal to ours where it can (``pytest -m gpu``)."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch
from torch import nn

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Batch
from modalities_models.head import LinearHead
from modalities_models.losses import CrossEntropy, LigerCrossEntropy
from modalities_models.losses import liger as liger_module


def pretend(monkeypatch, installed: str | None) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(liger_module, "version", version)


@pytest.mark.parametrize(("installed", "why"), [(None, "needs the package"), ("0.8.1", "0.8.2 or newer, not 0.8.1")])
def test_missing_or_old_it_names_the_line_that_installs_it(monkeypatch, installed, why):
    pretend(monkeypatch, installed)
    with pytest.raises(ConfigError, match=why) as caught:
        LigerCrossEntropy()
    assert caught.value.hint == 'pip install "modalities-models[liger]"'


@pytest.mark.parametrize("installed", ["0.8.2", "0.8.10", "0.9.0.dev1", "1.0"])
def test_new_enough_versions_are_taken(monkeypatch, installed):
    pretend(monkeypatch, installed)
    assert LigerCrossEntropy(z_loss=1e-4).evaluation.objective == CrossEntropy().objective


def test_on_a_cpu_it_says_why_not_and_what_to_take(monkeypatch):
    pretend(monkeypatch, "0.8.5")
    targets = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ConfigError, match="GPUs only.*this run is on cpu") as caught:
        LigerCrossEntropy()(torch.zeros(1, 2, 4), nn.Linear(4, 8, bias=False), Batch(targets, targets))
    assert "loss.cross_entropy" in caught.value.hint


@pytest.mark.parametrize("wrong", [{"label_smoothing": 1.0}, {"z_loss": -1.0}])
def test_arguments_out_of_range_are_refused(monkeypatch, wrong):
    pretend(monkeypatch, "0.8.5")
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        LigerCrossEntropy(**wrong)


def cuda_case(dtype, weighting, **head_arguments):
    pytest.importorskip("liger_kernel")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    hidden = torch.randn(2, 33, 64, device="cuda").to(dtype).requires_grad_()
    head = LinearHead(1024, 64, 1000, **head_arguments).to("cuda", dtype)
    nn.init.normal_(head.weight, std=0.3)
    targets = torch.randint(1000, (2, 33), device="cuda")
    weights = {
        "none": None,
        "mask": torch.randint(2, (2, 33), device="cuda").float(),
        "fractions": torch.rand(2, 33, device="cuda"),
    }[weighting]
    return hidden, head, Batch(targets, targets, weights)


@pytest.mark.gpu
@pytest.mark.parametrize("weighting", ["none", "mask", "fractions"])
@pytest.mark.parametrize("objective", [{}, {"label_smoothing": 0.1, "z_loss": 1e-2}])
@pytest.mark.parametrize("head_arguments", [{}, {"multiplier": 0.5, "softcap": 5.0}])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_equals_ours(weighting, objective, head_arguments, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    hidden, head, batch = cuda_case(dtype, weighting, **head_arguments)
    results = []
    for loss in (CrossEntropy(**objective), CrossEntropy(16, **objective), LigerCrossEntropy(**objective)):
        value, tokens = loss(hidden, head, batch)
        results.append((value, tokens, *torch.autograd.grad(value, [hidden, head.weight])))
    dense, *others = results
    for other in others:
        for ours, theirs in zip(other, dense, strict=True):
            assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.gpu
def test_a_frozen_model_still_trains_its_head():
    hidden, head, batch = cuda_case(torch.float32, "none")
    CrossEntropy()(hidden.detach(), head, batch).loss.backward()
    wanted, head.weight.grad = head.weight.grad, None
    LigerCrossEntropy()(hidden.detach(), head, batch).loss.backward()
    assert (head.weight.grad - wanted).norm() <= 1e-3 * wanted.norm()


@pytest.mark.gpu
def test_a_head_with_a_bias_is_refused():
    hidden, _, batch = cuda_case(torch.float32, "none")
    with pytest.raises(ConfigError, match="does not know what Linear does"):
        LigerCrossEntropy()(hidden, nn.Linear(64, 1000).cuda(), batch)


@pytest.mark.gpu
def test_a_target_outside_the_vocabulary_is_refused():
    hidden, head, batch = cuda_case(torch.float32, "none")
    batch.targets_BT[0, 0] = 1000
    with pytest.raises(IndexError, match="less than 1000"):
        LigerCrossEntropy()(hidden, head, batch)
