"""Schedules against torch's own, step by step."""

import math

import pytest
import torch
from torch.optim import lr_scheduler

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Schedule
from modalities_core.training.schedule import (
    Constant,
    Exponential,
    InverseSqrt,
    Linear,
    OneCycle,
    Step,
    WarmupCosine,
    WarmupStableDecay,
)

PEAK = 0.5


def torch_rates(make, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"] / PEAK)
        optimizer.step()
        scheduler.step()
    return rates


def ours(schedule, steps):
    assert isinstance(schedule, Schedule)
    return [schedule(step) for step in range(steps)]


@pytest.mark.parametrize("warmup", [1, 2, 7])
def test_warmup_is_torchs_linear_lr(warmup):
    def expected(optimizer):
        return lr_scheduler.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)

    rates = torch_rates(expected, 15) if warmup > 1 else [1.0] * 15
    for schedule in (Constant(warmup), Step(100, 0.1, warmup), WarmupStableDecay(warmup, 0, 15)):
        assert ours(schedule, 15) == pytest.approx(rates, rel=1e-12)


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_cosine_is_torchs_cosine_annealing_after_warmup(final):
    def expected(optimizer):
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=final * PEAK)

    rates = torch_rates(expected, 20)
    assert ours(WarmupCosine(0, 20, final), 20) == pytest.approx(rates, rel=1e-9)
    assert ours(WarmupCosine(5, 25, final), 25)[5:] == pytest.approx(rates, rel=1e-9)
    assert ours(WarmupStableDecay(3, 20, 30, final, "cosine"), 30)[10:] == pytest.approx(rates, rel=1e-9)


@pytest.mark.parametrize("final", [0.0, 0.25])
def test_linear_decay_is_torchs_linear_lr(final):
    def expected(optimizer):
        return lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=final, total_iters=20)

    rates = torch_rates(expected, 25)
    assert ours(Linear(0, 20, final), 25) == pytest.approx(rates, rel=1e-9, abs=1e-12)
    assert ours(WarmupStableDecay(2, 20, 30, final), 35)[10:] == pytest.approx(rates, rel=1e-9, abs=1e-12)


def test_step_is_torchs_step_lr():
    rates = torch_rates(lambda optimizer: lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.3), 20)
    assert ours(Step(every=4, gamma=0.3), 20) == pytest.approx(rates, rel=1e-9)


@pytest.mark.parametrize(("shape", "strategy"), [("cosine", "cos"), ("linear", "linear")])
@pytest.mark.parametrize(("steps", "warmup"), [(20, 0.3), (37, 0.11)])
def test_one_cycle_is_torchs(shape, strategy, steps, warmup):
    def exact(optimizer):
        return lr_scheduler.OneCycleLR(
            optimizer, max_lr=PEAK, total_steps=steps, pct_start=warmup, anneal_strategy=strategy
        )

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = exact(optimizer)
    rates = []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"] / PEAK)
        optimizer.step()
        if step < steps - 1:  # torch refuses to go beyond
            scheduler.step()
    schedule = OneCycle(steps, warmup, shape=shape)
    assert ours(schedule, steps) == pytest.approx(rates, rel=1e-9)
    assert schedule(steps + 50) == schedule(steps - 1)


def test_exponential_decay_is_torchs_exponential_lr():
    rates = torch_rates(lambda optimizer: lr_scheduler.ExponentialLR(optimizer, gamma=0.25 ** (1 / 20)), 20)
    assert ours(Exponential(0, 20, 0.25), 20) == pytest.approx(rates, rel=1e-9)
    assert ours(Exponential(5, 25, 0.25), 25)[5:] == pytest.approx(rates, rel=1e-9)
    assert ours(WarmupStableDecay(3, 20, 30, 0.25, "exponential"), 30)[10:] == pytest.approx(rates, rel=1e-9)


@pytest.mark.parametrize("warmup", [1, 4, 13])
def test_inverse_square_root_is_that_of_the_transformer(warmup):
    # "Attention is all you need", equation 3, over its largest value; its first step is 1.
    rates = [min(step**-0.5, step * warmup**-1.5) / warmup**-0.5 for step in range(1, 60)]
    assert ours(InverseSqrt(warmup), 59) == pytest.approx(rates, rel=1e-12)
    assert InverseSqrt(warmup)(4 * warmup - 1) == pytest.approx(0.5)


def test_square_root_decay_by_its_formula():
    schedule = WarmupStableDecay(2, 4, 10, final=0.2, shape="sqrt")
    assert ours(schedule, 11) == pytest.approx(
        [0.5, 1, 1, 1, 1, 1, 1.0, 1 - 0.8 * math.sqrt(0.25), 1 - 0.8 * math.sqrt(0.5), 1 - 0.8 * math.sqrt(0.75), 0.2]
    )


@pytest.mark.parametrize(
    "schedule",
    [
        Linear(3, 10, 0.1),
        WarmupCosine(3, 10, 0.1),
        WarmupStableDecay(3, 4, 10, 0.1),
        Linear(10, 10, 0.1),
        Exponential(3, 10, 0.1),
        WarmupStableDecay(3, 4, 10, 0.1, "exponential"),
    ],
)
def test_after_the_end_it_stays_at_the_final_factor(schedule):
    assert [schedule(step) for step in (10, 11, 1000)] == pytest.approx([0.1] * 3)
    assert schedule(0) > 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: WarmupCosine(11, 10),
        lambda: Linear(11, 10),
        lambda: WarmupStableDecay(11, 0, 10),
        lambda: WarmupStableDecay(6, 5, 10),
        lambda: WarmupStableDecay(0, 5, 10, shape="round"),
        lambda: WarmupCosine(-1, 10),
        lambda: WarmupCosine(0, 0),
        lambda: WarmupCosine(0, 10, 1.5),
        lambda: WarmupCosine(0, 10, math.nan),
        lambda: WarmupStableDecay(0, 5, 10, shape="exponential"),
        lambda: Exponential(0, 10, final=0.0),
        lambda: Exponential(11, 10),
        lambda: InverseSqrt(0),
        lambda: Constant(-1),
        lambda: Step(0),
        lambda: Step(1, gamma=0),
        lambda: OneCycle(10, warmup=1.0),
        lambda: OneCycle(3, warmup=0.3),
        lambda: OneCycle(10, initial_division=0.5),
    ],
)
def test_impossible_numbers_are_refused(make):
    with pytest.raises(ConfigError):
        make()
