"""RMSNorm against torch's own, which is differentiated step by step, and against finite differences."""

import pytest
import torch
from torch.nn import functional as F

from modalities_models.nn.norms import RMSNorm


def made(size, dtype, eps=1e-5):
    module = RMSNorm(size, eps=eps)
    with torch.no_grad():
        module.weight.copy_(1 + 0.3 * torch.randn(size, generator=torch.Generator().manual_seed(1)))
    return module.to(dtype)


def drawn(shape, dtype, seed=0):
    # Far from a mean of 0, which RMSNorm unlike LayerNorm keeps.
    values = 3 + torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype)


@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 3, 4, 16), (0, 16)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-7), (torch.bfloat16, 0.004)]
)
def test_values_and_gradients_are_those_of_float64(shape, dtype, tolerance):
    module, x, gradient = made(16, dtype), drawn(shape, dtype).requires_grad_(), drawn(shape, dtype, 2) - 3
    y = module(x)
    got = (y, *torch.autograd.grad(y, (x, module.weight), gradient))
    exact_x, exact_weight = x.detach().double().requires_grad_(), module.weight.detach().double().requires_grad_()
    exact = F.rms_norm(exact_x, (16,), exact_weight, 1e-5)
    wanted = (exact, *torch.autograd.grad(exact, (exact_x, exact_weight), gradient.double()))
    for mine, true in zip(got, wanted, strict=True):
        assert mine.dtype == dtype and mine.shape == true.shape
        assert (mine - true).norm() <= tolerance * true.norm()


def test_gradients_are_finite_differences():
    module = made(6, torch.float64, eps=0.1)
    x = drawn((2, 3, 6), torch.float64).requires_grad_()

    def normed(x, weight):
        return torch.func.functional_call(module, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(normed, (x, module.weight))


def test_gradients_that_lie_otherwise_in_memory():
    module, x = made(16, torch.float32), drawn((3, 4, 16), torch.float32).requires_grad_()
    gradient = drawn((4, 3, 16), torch.float32, 2).transpose(0, 1)
    mine = torch.autograd.grad(module(x), x, gradient)[0]
    torchs = torch.autograd.grad(F.rms_norm(x, (16,), module.weight, 1e-5), x, gradient)[0]
    torch.testing.assert_close(mine, torchs)


def test_autocast_and_evaluation_give_the_inputs_type():
    module, x = made(16, torch.float32), drawn((2, 16), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        trained = module(x.requires_grad_())
    with torch.no_grad():
        read = module(x)
    assert trained.dtype == read.dtype == torch.bfloat16
    torch.testing.assert_close(trained, read)


def test_nothing_but_the_input_is_kept():
    module, x = made(64, torch.float32), drawn((128, 64), torch.float32).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda _: None):
        module(x)
    assert sorted(kept) == [64, 128, 128 * 64]
