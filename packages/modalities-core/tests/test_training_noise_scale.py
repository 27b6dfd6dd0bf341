"""The gradient noise scale of a problem whose noise scale is known, and what the loop does with it."""

import pytest
import torch
from torch import nn
from training_parts import TinyBatches

from modalities_core.errors import ConfigError
from modalities_core.interfaces import LossSum
from modalities_core.training.noise_scale import NoiseScale, check_noise_scale, estimates
from modalities_core.training.world import Alone

SIZE = 40


class Quadratic:
    """Loss 1/2 |w - x|^2 over samples x from N(center, deviation^2): the gradient's noise is that of x, at any w."""

    def __init__(self, deviation):
        self.deviation = deviation
        self.weight = nn.Parameter(torch.zeros(SIZE))
        self.center = torch.full((SIZE,), 0.5)
        self.after_first = None
        self.scaler = None
        self.random = torch.Generator().manual_seed(0)

    @property
    def noise_scale(self):
        return SIZE * self.deviation**2 / self.center.square().sum().item()

    def forward_backward(self, micro_batches):
        totals = LossSum(torch.zeros(()), torch.zeros(()))
        for place, count in enumerate(micro_batches):
            noise = torch.randn(count, SIZE, generator=self.random)
            samples = self.center + self.deviation * noise
            loss = 0.5 * (self.weight - samples).square().sum()
            if self.scaler is not None:
                loss = loss * self.scaler.scale
            loss.backward()
            part = LossSum(loss.detach(), torch.tensor(float(count)))
            totals = LossSum(totals.loss + part.loss, totals.tokens + part.tokens)
            if place == 0 and len(micro_batches) > 1 and self.after_first is not None:
                self.after_first(part)
        return totals


def measured(problem, micro_batches, steps, noise=None):
    noise = noise or NoiseScale(problem, Alone("cpu"), [problem.weight])
    for _ in range(steps):
        problem.weight.grad = None
        noise.forward_backward(micro_batches)
    return noise


@pytest.mark.parametrize("deviation", [0.5, 2.0, 5.0])
@pytest.mark.parametrize("micro_batches", [[8, 8, 8, 8], [16, 64]])
def test_known_noise_scale_is_found(deviation, micro_batches):
    problem = Quadratic(deviation)
    found = measured(problem, micro_batches, 1500).value()
    assert found == pytest.approx(problem.noise_scale, rel=0.25)


def test_estimates_have_no_bias():
    problem = Quadratic(2.0)
    trials = torch.zeros(2, dtype=torch.float64)
    for _ in range(4000):
        parts = (problem.center + problem.deviation * torch.randn(12, SIZE, generator=problem.random)).double()
        small, large = parts[:4].sum(0).square().sum(), parts.sum(0).square().sum()
        trials += torch.stack(estimates(small, torch.tensor(4.0), large, torch.tensor(12.0)))
    squared, variance = trials / 4000
    assert squared == pytest.approx(SIZE * 0.25, rel=0.03)
    assert variance == pytest.approx(SIZE * 4.0, rel=0.03)


def test_the_scale_of_the_loss_does_not_matter():
    plain, scaled = Quadratic(2.0), Quadratic(2.0)

    class Scaler:
        scale = torch.tensor(1024.0)

    scaled.scaler = Scaler()
    assert measured(scaled, [4, 4], 50).value() == pytest.approx(measured(plain, [4, 4], 50).value(), rel=1e-5)


def test_resuming_continues_the_means():
    straight, broken = Quadratic(2.0), Quadratic(2.0)
    whole = measured(straight, [4, 12], 60)
    state = measured(broken, [4, 12], 25).state()
    resumed = NoiseScale(broken, Alone("cpu"), [broken.weight])
    resumed.restore(state)
    measured(broken, [4, 12], 35, resumed)
    assert resumed.value() == whole.value()


def test_steps_that_tell_nothing_are_left_out():
    problem = Quadratic(2.0)
    noise = measured(problem, [4, 4], 20)
    before = noise.state()
    measured(problem, [8], 3, noise)
    assert noise.state() == before
    problem.center[0] = torch.nan
    measured(problem, [4, 4], 1, noise)
    assert noise.state() == before
    assert NoiseScale(problem, Alone("cpu"), [problem.weight]).value() is None


def test_runs_that_cannot_tell_are_refused():
    class Silent:
        pass

    telling, alone = Quadratic(1.0), Alone("cpu")
    with pytest.raises(ConfigError, match="Silent does not tell"):
        check_noise_scale(Silent(), TinyBatches(8, 4), alone, None)
    check_noise_scale(telling, TinyBatches(8, 4), alone, None)
    with pytest.raises(ConfigError, match="one micro batch of 8 on each of 1 ranks") as caught:
        check_noise_scale(telling, TinyBatches(8, 8), alone, None)
    assert caught.value.hint.startswith("halve micro_batch_size, or set samples_per_step to at least 16")
