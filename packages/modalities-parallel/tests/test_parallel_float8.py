"""Linear layers in float8, emulated: what is rounded and how, what stays, and what is refused."""

from __future__ import annotations

import sys

import pytest
import torch
from parallel_small_model import LOSSES, SmallModel, batch
from torch import nn

from modalities_core.errors import ConfigError
from modalities_core.training.executor import Plain
from modalities_core.training.world import Alone
from modalities_parallel.float8 import float8
from modalities_parallel.fsdp import fsdp2

CPU = Alone("cpu")
LARGEST = 448.0  # of float8_e4m3fn


@pytest.fixture(autouse=True)
def needs_torchao(request):
    if "without_torchao" not in request.fixturenames:
        pytest.importorskip("torchao.float8")


@pytest.fixture
def without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)


def model(hidden=16):
    built = SmallModel(hidden=hidden)
    with torch.no_grad():
        for name, value in built.initial_values():
            {**dict(built.named_parameters()), **dict(built.named_buffers())}[name].copy_(value)
    return built


def rounded(values, axis=None):
    """As the paper has it: scaled so that the largest is the largest of the format, rounded, scaled back."""
    largest = values.abs().amax() if axis is None else values.abs().amax(axis, keepdim=True)
    scale = LARGEST / largest
    return (values * scale).to(torch.float8_e4m3fn).float() / scale


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_a_product_is_that_of_the_rounded_factors(recipe):
    built = model()
    weight = built.blocks[0].qkv.weight.detach().clone()
    float8(built, CPU, recipe, emulate=True)
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    axis = None if recipe == "tensorwise" else -1
    expected = rounded(x, axis) @ rounded(weight, axis).T
    found = built.blocks[0].qkv(x)
    # Rowwise scales are rounded to powers of two; a product then differs by half a step of the format.
    assert (found - expected).norm() <= (1e-4 if recipe == "tensorwise" else 0.06) * expected.norm()
    assert (found - x @ weight.T).norm() > 1e-3 * expected.norm()


def test_weights_names_and_what_lies_outside_of_blocks_stay():
    plain, built = model(), model()
    parameters = list(built.parameters())
    assert float8(built, CPU, emulate=True) is built
    assert all(a is b for a, b in zip(parameters, built.parameters(), strict=True))
    assert list(built.state_dict()) == list(plain.state_dict())
    assert type(built.head) is nn.Linear
    assert {type(block.qkv).__name__ for block in built.blocks} == {"Float8Linear"}


def test_it_trains_as_the_exact_model_within_rounding():
    exact, ours = model(), float8(model(), CPU, emulate=True)
    losses = {}
    for built in (exact, ours):
        plain = Plain(built, LOSSES["weighted"], CPU, precision="bf16")
        optimizer = torch.optim.AdamW(built.parameters(), lr=1e-2, eps=1e-4)
        for step in range(12):
            sums = plain.forward_backward([batch(step % 2, 0, 12)])
            for value in built.parameters():
                value.grad /= sums.tokens
            optimizer.step()
            optimizer.zero_grad()
            losses.setdefault(built, []).append((sums.loss / sums.tokens).item())
    assert losses[ours] == pytest.approx(losses[exact], rel=0.03)
    assert losses[ours][-1] < losses[ours][0] and losses[ours] != losses[exact]


def test_inside_of_fsdp2_it_is_built_without_memory_and_filled():
    built = fsdp2(lambda: float8(SmallModel(hidden=16), CPU, emulate=True), CPU)
    expected = model().state_dict()
    for name, value in built.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.slow
def test_sharded_over_two_ranks(on_ranks):
    pair = on_ranks(2, "execute", in_float8=True)
    exact = Plain(fsdp2(lambda: SmallModel(hidden=16), CPU), LOSSES["weighted"], CPU)
    sums = exact.forward_backward([batch(0, 0, 12)])
    for result in pair:
        assert result["losses"][0] == pytest.approx((sums.loss / sums.tokens).item(), rel=0.02)
        assert result["names"]


def test_devices_without_float8_are_refused_but_not_where_a_run_is_only_checked():
    with pytest.raises(ConfigError, match="computes on cpu"):
        float8(model(), CPU)
    with torch.device("meta"):
        float8(SmallModel(hidden=16), Alone())


def test_models_without_a_layer_that_fits_and_wrong_recipes_are_refused():
    with pytest.raises(ConfigError, match="multiples of 16"):
        float8(model(hidden=14), CPU, emulate=True)
    with pytest.raises(ConfigError, match="recipe is tensorwise"):
        float8(model(), CPU, "blockwise", emulate=True)


def test_a_missing_torchao_is_named(without_torchao):
    with pytest.raises(ConfigError, match=r"modalities-parallel\[float8\]"):
        float8(model(), CPU, emulate=True)
