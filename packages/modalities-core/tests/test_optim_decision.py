"""A step may be scaled or skipped by tensors on the device, and the host is never asked."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modalities_core.training.optim import adam, adamw, lion, muon, sgd

OPTIMIZERS = {
    "adamw": lambda model: adamw(model, 0.01),
    "adamw bf16": lambda model: adamw(model, 0.01, state_dtype="bf16"),
    "adamw int8": lambda model: adamw(model, 0.01, state_dtype="int8"),
    "adam": lambda model: adam(model, 0.01, weight_decay=0.1),
    "sgd": lambda model: sgd(model, 0.01, weight_decay=0.1),
    "sgd plain": lambda model: sgd(model, 0.01, momentum=0.0),
    "nesterov": lambda model: sgd(model, 0.01, nesterov=True, state_dtype="bf16"),
    "lion": lambda model: lion(model, 0.01),
    "lion bf16": lambda model: lion(model, 0.01, state_dtype="bf16"),
    "muon": lambda model: muon(model, 0.01),
    "muon bf16": lambda model: muon(model, 0.01, state_dtype="bf16"),
}
pytestmark = pytest.mark.parametrize("name", OPTIMIZERS)


class Model(torch.nn.Module):
    """A matrix large enough for 8-bit states, and a vector."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = torch.nn.Parameter(torch.randn(20, 300, generator=generator))
        self.bias = torch.nn.Parameter(torch.randn(7, generator=generator))

    def give(self, seed, factor=1.0):
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.grad = (torch.randn(parameter.shape, generator=generator) * factor).to(parameter.dtype)


class NoWaiting(TorchDispatchMode):
    """Fails where a value goes to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func), "the host asked the device"
        return func(*args, **(kwargs or {}))


def everything(model, optimizer):
    state = [value for parameter in model.parameters() for value in optimizer.state[parameter].values()]
    return [value.detach().clone() for value in [*model.parameters(), *state]]


def decide(optimizer, scale, skip):
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(skip)
    with NoWaiting():
        optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_step_changes_nothing(name, dtype):
    model = Model().to(dtype)
    optimizer = OPTIMIZERS[name](model)
    assert optimizer._step_supports_amp_scaling
    for bad in (math.nan, math.inf, 1.0):
        model.give(0)
        optimizer.step()
        before = everything(model, optimizer)
        model.give(1)
        model.matrix.grad[3, 4] = bad
        decide(optimizer, 2.0, 1.0)
        for old, new in zip(before, everything(model, optimizer), strict=True):
            assert torch.equal(old, new)


def test_a_skipped_first_step_changes_nothing(name):
    model, untouched = Model(), Model()
    optimizer, other = OPTIMIZERS[name](model), OPTIMIZERS[name](untouched)
    model.give(0, math.inf)
    decide(optimizer, math.nan, 1.0)
    for one, two in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(one, two)
    for each, its in ((model, optimizer), (untouched, other)):
        each.give(1)
        its.step()
    for one, two in zip(everything(model, optimizer), everything(untouched, other), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_gradients_are_divided_by_the_scale(name):
    scaled, plain = Model(), Model()
    optimizers = [OPTIMIZERS[name](scaled), OPTIMIZERS[name](plain)]
    for seed in range(3):
        scaled.give(seed, 8.0)
        plain.give(seed)
        decide(optimizers[0], 8.0, 0.0)
        optimizers[1].step()
    for one, two in zip(everything(scaled, optimizers[0]), everything(plain, optimizers[1]), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)
