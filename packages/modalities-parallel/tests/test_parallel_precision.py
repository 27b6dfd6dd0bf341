"""The executor's precisions against FSDP2's own mixed precision, and on several ranks."""

from __future__ import annotations

import functools

import pytest
import torch
from parallel_small_model import LOSSES, SAMPLES, SmallModel, batch

from modalities_core.training.compiling import compile_obstacle
from modalities_core.training.executor import Plain
from modalities_core.training.world import Alone
from modalities_parallel.fsdp import fsdp2

STEPS, ACCUMULATION = 3, 2


def alone(model, precision="fp32"):
    """The same steps in this process: losses, and gradients of the first step."""
    plain = Plain(model, LOSSES["weighted"], Alone("cpu"), precision=precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    size, losses, first = SAMPLES // ACCUMULATION, [], None
    for step in range(STEPS):
        sums = plain.forward_backward([batch(step, start, size) for start in range(0, SAMPLES, size)])
        first = first or [value.grad.clone() for value in model.parameters()]
        for value in model.parameters():
            value.grad /= sums.tokens
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append((sums.loss / sums.tokens).item())
    return plain, losses, first


@pytest.mark.parametrize("tie", ["none", "read"])
def test_copies_compute_what_fsdp2_computes_on_one_rank(on_ranks, tie):
    (sharded,) = on_ranks(1, "execute", param_dtype="bf16", tie=tie, environment={"RANK": "0"})
    model = fsdp2(functools.partial(SmallModel, tie), Alone("cpu"), param_dtype="bf16")
    plain, losses, gradients = alone(model)
    assert plain.precision == sharded["precision"] == "bf16"
    assert losses[0] == pytest.approx(sharded["losses"][0], rel=1e-6)
    for ours, theirs in zip(gradients, sharded["gradients"], strict=True):
        # Sums over tokens, and over the uses of a weight, are rounded to bfloat16 there and stay float32 here.
        assert (ours - torch.tensor(theirs)).norm() <= 0.01 * ours.norm()
    assert losses == pytest.approx(sharded["losses"], rel=1e-3)


def test_in_one_process_the_executor_computes_with_copies_and_everybody_else_under_autocast():
    model = fsdp2(SmallModel, Alone("cpu"), param_dtype="bf16")
    micro, dtypes = batch(0, 0, 4), []

    def loss(hidden_BTD, head, batch):
        dtypes.append(model.embedding.weight.dtype)
        assert not torch.is_autocast_enabled("cpu") and hidden_BTD.dtype == head(hidden_BTD).dtype == torch.bfloat16
        return LOSSES["weighted"](hidden_BTD, head, batch)

    Plain(model, loss, Alone("cpu")).forward_backward([micro])
    assert dtypes == [torch.bfloat16]
    assert model(micro.tokens_BT).dtype == torch.bfloat16
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_fp16_on_two_ranks_is_float32_within_rounding(on_ranks):
    _, exact, _ = alone(fsdp2(SmallModel, Alone("cpu"), param_dtype="fp32"))
    first, second = on_ranks(2, "execute", param_dtype="fp16")
    assert first["precision"] == "fp16" and first["dtypes"] == ["torch.float32"]
    assert first["losses"] == second["losses"] == pytest.approx(exact, rel=5e-3)
    assert first["scales"] == second["scales"] and first["scales"][0] > 1


@pytest.mark.slow
@pytest.mark.skipif(bool(compile_obstacle(torch.device("cpu"))), reason="needs a C++ compiler")
def test_compiled_blocks_on_two_ranks(on_ranks):
    eager = on_ranks(2, "execute")
    for ours, theirs in zip(on_ranks(2, "execute", compile="blocks", timeout=280), eager, strict=True):
        assert ours["names"]
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=0.01)
        assert ours["norms"] == pytest.approx(theirs["norms"], rel=0.1)
        assert ours["evaluated"] == pytest.approx(theirs["evaluated"], rel=0.01)


def test_bfloat16_weights_on_two_ranks(on_ranks):
    for result in on_ranks(2, "execute", precision="bf16_weights", param_dtype="bf16"):
        assert result["dtypes"] == ["torch.bfloat16"]
        assert result["losses"][-1] < result["losses"][0]
