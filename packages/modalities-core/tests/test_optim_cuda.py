"""On a GPU: no step waits for the device, and updates are those of the CPU."""

import functools

import pytest
import torch

from modalities_core.training.optim import adam, adamw, lion, muon, sgd

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OPTIMIZERS = {
    "adamw": functools.partial(adamw, lr=1e-2),
    "adamw bf16": functools.partial(adamw, lr=1e-2, state_dtype="bf16"),
    "adamw int8": functools.partial(adamw, lr=1e-2, state_dtype="int8"),
    "adam": functools.partial(adam, lr=1e-2),
    "sgd": functools.partial(sgd, lr=1e-2, nesterov=True),
    "lion": functools.partial(lion, lr=1e-3),
    "muon": functools.partial(muon, lr=1e-2),
}


def step(model, optimizer, device, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(device, parameter.dtype)
    optimizer.grad_scale = torch.ones((), device=device)
    optimizer.found_inf = torch.zeros((), device=device)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_never_wait_and_land_where_those_of_the_cpu_do(name, dtype):
    found = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = torch.nn.Linear(96, 80).to(dtype).to(device)
        optimizer = OPTIMIZERS[name](model)
        step(model, optimizer, device, 0)  # the first makes the states
        if device == "cuda":
            generator = torch.Generator().manual_seed(1)
            gradients = [torch.randn(value.shape, generator=generator).to(value) for value in model.parameters()]
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.grad_scale, optimizer.found_inf = (torch.full((), float(v), device=device) for v in (1, 0))
            torch.cuda.set_sync_debug_mode("error")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            del optimizer.grad_scale, optimizer.found_inf
        else:
            step(model, optimizer, device, 1)
        found[device] = [value.detach().float().cpu() for value in model.parameters()]
    tolerance = 2e-2 if dtype == torch.bfloat16 or name in ("muon", "adamw int8") else 1e-5
    for one, two in zip(found["cpu"], found["cuda"], strict=True):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance / 10)
