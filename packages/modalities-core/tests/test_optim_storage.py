"""States in fewer bits: close to those in full, and rounding that is right on average and the same again."""

import copy

import pytest
import torch

from modalities_core.training.optim import adamw, lion, muon
from modalities_core.training.optim.quantized import BLOCK, dequantize, quantize
from modalities_core.training.optim.rounding import keys, round_stochastically, salt


def key_of(step, name="weight"):
    return keys([torch.tensor(float(step))], torch.tensor([salt(name)]))[0]


def test_rounding_keeps_what_bfloat16_has():
    values = torch.randn(1000).to(torch.bfloat16).float()
    values[:4] = torch.tensor([float("inf"), float("-inf"), 0.0, -0.0])
    assert torch.equal(round_stochastically(values, key_of(3), 0, 0).float(), values)
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32)
    assert round_stochastically(bits.view(torch.float32), key_of(3), 0, 0).isnan().all()


@pytest.mark.parametrize("value", [1.0 + 2**-10, -3.7, 1e-30, 12345.678])
def test_rounding_is_unbiased_over_elements_and_over_steps(value):
    count = 40_000
    exact = torch.full((count,), value)
    below, above = sorted(
        torch.tensor(value).view(torch.int32).bitwise_and(~0xFFFF).add(more).view(torch.float32).item()
        for more in (0, 0x10000)
    )
    share = (value - below) / (above - below)
    over_elements = round_stochastically(exact, key_of(1), 0, 0).double()
    over_steps = torch.stack([round_stochastically(exact[:20], key_of(step), 0, 0) for step in range(2000)]).double()
    for found in (over_elements, over_steps):
        assert set(found.unique().tolist()) <= {below, above}
        up = (found == above).double().mean().item()
        # Five standard deviations of a fair draw.
        assert abs(up - share) < 5 * (share * (1 - share) / found.numel()) ** 0.5 + 1 / 65536


def test_random_bits_of_elements_steps_streams_and_parameters_are_unrelated():
    exact = torch.full((20_000,), 1.0 + 2**-8)  # halfway, so that each goes up or down with equal odds

    def ups(step=1, name="weight", first=0, stream=0):
        return (round_stochastically(exact, key_of(step, name), first, stream).double() > 1).double() * 2 - 1

    here = ups()
    bound = 5 / 20_000**0.5
    others = [ups(step=2), ups(step=1000), ups(name="bias"), ups(first=1), ups(stream=1), ups(stream=2)]
    others += [here.roll(shift) for shift in (1, 2, 3, 64, 256, 1000)]
    assert all(abs((here * other).mean()) < bound for other in others)
    assert torch.equal(here[7:], ups(first=7)[:-7])


def test_small_updates_arrive_with_stochastic_rounding_and_vanish_without():
    moved = {}
    for rounding in ("nearest", "stochastic"):
        model = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
        torch.nn.init.ones_(model.weight)
        optimizer = adamw(model, lr=1e-4, weight_decay=0.0, rounding=rounding)
        for _ in range(100):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
        moved[rounding] = (1 - model.weight.float()).mean().item()
    assert moved["nearest"] == 0
    assert moved["stochastic"] == pytest.approx(0.01, rel=0.05)


def regression(optimizer_of, dtype=torch.float32, steps=150):
    """Loss of a small network on a fixed task, and its weights."""
    generator = torch.Generator().manual_seed(0)
    inputs, teacher = torch.randn(64, 96, generator=generator), torch.randn(96, 64, generator=generator)
    targets = torch.tanh(inputs @ teacher / 10)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 80), torch.nn.Tanh(), torch.nn.Linear(80, 64)).to(dtype)
    optimizer = optimizer_of(model)
    for _ in range(steps):
        loss = (model(inputs.to(dtype)).float() - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), [value.detach().float() for value in model.parameters()]


def distance(mine, theirs):
    start = regression(lambda model: adamw(model, lr=3e-3), steps=1)[1]
    apart = sum((a - b).square().sum() for a, b in zip(mine, theirs, strict=True))
    moved = sum((b - c).square().sum() for b, c in zip(theirs, start, strict=True))
    return (apart / moved).sqrt().item()


@pytest.mark.parametrize(("state_dtype", "apart"), [("bf16", 0.1), ("int8", 0.15)])
def test_states_in_fewer_bits_train_like_those_in_full(state_dtype, apart):
    loss, weights = regression(lambda model: adamw(model, lr=3e-3))
    low_loss, low_weights = regression(lambda model: adamw(model, lr=3e-3, state_dtype=state_dtype))
    assert low_loss == pytest.approx(loss, rel=0.1)
    assert distance(low_weights, weights) < apart


@pytest.mark.parametrize("component", [lion, muon])
def test_momentum_in_bfloat16_trains_like_that_in_full(component):
    loss, _ = regression(lambda model: component(model, lr=1e-3))
    low_loss, _ = regression(lambda model: component(model, lr=1e-3, state_dtype="bf16"))
    assert low_loss == pytest.approx(loss, rel=0.1)


@pytest.mark.parametrize("component", [adamw, lion, muon])
def test_weights_in_bfloat16_train_like_those_in_full(component):
    loss, _ = regression(lambda model: component(model, lr=1e-3))
    low_loss, _ = regression(lambda model: component(model, lr=1e-3), torch.bfloat16)
    assert low_loss == pytest.approx(loss, rel=0.25)


def test_pieces_do_not_change_the_result(monkeypatch):
    from modalities_core.training.optim import shards

    def run():
        return regression(lambda model: adamw(model, lr=3e-3, state_dtype="int8"), torch.bfloat16, steps=5)[1]

    whole = run()
    monkeypatch.setitem(shards.PIECE_ELEMENTS, "cpu", 200)
    for one, two in zip(whole, run(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("component", [adamw, lion, muon])
@pytest.mark.parametrize(("dtype", "state_dtype"), [(torch.bfloat16, "fp32"), (torch.float32, "bf16")])
def test_a_state_dict_is_taken_over_as_it_is(component, dtype, state_dtype):
    assert_taken_over(lambda model: component(model, lr=1e-3, state_dtype=state_dtype), dtype)


def test_a_state_dict_of_8_bits_is_taken_over_as_it_is():
    assert_taken_over(lambda model: adamw(model, lr=1e-3, state_dtype="int8"), torch.float32)


def assert_taken_over(optimizer_of, dtype):
    torch.manual_seed(0)
    model = torch.nn.Linear(80, 64).to(dtype)
    optimizer = optimizer_of(model)

    def step(given, its):
        generator = torch.Generator().manual_seed(0)
        for value in given.parameters():
            value.grad = torch.randn(value.shape, generator=generator).to(dtype)
        its.step()

    step(model, optimizer)
    other = copy.deepcopy(model)
    resumed = optimizer_of(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would share its tensors
    for each, its in ((model, optimizer), (other, resumed)):
        step(each, its)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        for name, value in optimizer.state[one].items():
            assert value.dtype == resumed.state[two][name].dtype and torch.equal(value, resumed.state[two][name])


def test_memory_of_8_bit_states():
    model = torch.nn.Linear(512, 256)
    optimizer = adamw(model, lr=1e-3, state_dtype="int8")
    model.weight.grad, model.bias.grad = torch.ones_like(model.weight), torch.ones_like(model.bias)
    optimizer.step()
    state = optimizer.state[model.weight]
    stored = sum(value.numel() * value.element_size() for value in state.values())
    assert stored == 4 + 2 * model.weight.numel() * (1 + 4 / BLOCK)
    assert optimizer.state[model.bias]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("width", [BLOCK, 100, 700])
def test_quantization_is_near_keeps_the_largest_and_changes_nothing_again(signed, width):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(30, width, generator=generator) * torch.logspace(-6, 6, 30)[:, None]
    values = values if signed else values.square()
    values[4] = 0
    codes, scales = quantize(values, signed)
    back = dequantize(codes, scales, signed)
    assert codes.dtype == torch.uint8 and scales.shape == (30, -(-width // BLOCK))
    assert not back[4].any()
    top = values.abs().amax(1)
    assert torch.equal(back.abs().amax(1), top)
    # The code's coarsest step is a 64th or 128th of a decade's nine tenths.
    assert ((back - values).abs().amax(1) <= top * (0.9 / (64 if signed else 128))).all()
    large = values.abs() > 0.01 * top[:, None]
    assert ((back - values).abs()[large] / values.abs()[large]).mean() < 0.02
    if not signed:
        assert (back[values > 0] > 0).all()
    again, scales_again = quantize(back, signed)
    assert torch.equal(dequantize(again, scales_again, signed), back) and torch.equal(scales_again, scales)
