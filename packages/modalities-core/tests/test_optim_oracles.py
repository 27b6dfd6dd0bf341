"""Updates against torch's own optimizers, and Lion against its published formula in float64."""

import importlib

import pytest
import torch
from training_parts import TinyModel

from modalities_core.training.optim import adam, adamw, lion, muon, sgd
from modalities_core.training.optim.orthogonal import orthogonalize
from modalities_core.training.optim.settings import set_learning_rates

STEPS = 6


def trained(optimizer_of, model=None, dtype=torch.float32, seed=0):
    """Parameters after some steps with the same random gradients and a learning rate that falls."""
    model = (model or TinyModel()).to(dtype)
    optimizer = optimizer_of(model)
    peaks = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
        set_learning_rates(optimizer, peaks, 1 - step / 10)
        optimizer.step()
    return dict(model.named_parameters())


def assert_close(mine, theirs, **tolerances):
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], **tolerances)


def test_adamw_is_torchs_fused_adamw_bit_for_bit():
    mine = trained(lambda model: adamw(model, 0.01, (0.8, 0.9), 1e-6, 0.3, no_decay=()))
    theirs = trained(
        lambda model: torch.optim.AdamW(
            model.parameters(), 0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3, fused=True
        )
    )
    assert_close(mine, theirs, rtol=0, atol=0)


def test_adam_is_torchs():
    mine = trained(lambda model: adam(model, 0.01, (0.8, 0.9), 1e-6, 0.3, no_decay=()), dtype=torch.float64)
    theirs = trained(
        lambda model: torch.optim.Adam(model.parameters(), 0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3),
        dtype=torch.float64,
    )
    assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_of_devices_without_a_fused_kernel_is_the_same(monkeypatch, decoupled):
    component = adamw if decoupled else adam
    with_kernel = trained(lambda model: component(model, 0.01, weight_decay=0.3), dtype=torch.float64)
    module = importlib.import_module("modalities_core.training.optim.adam")
    monkeypatch.setattr(module, "_get_fused_kernels_supported_devices", lambda: [])
    without = trained(lambda model: component(model, 0.01, weight_decay=0.3), dtype=torch.float64)
    assert_close(with_kernel, without, rtol=1e-6, atol=1e-9)  # its steps are float32


@pytest.mark.parametrize(
    "settings", [{"momentum": 0.0}, {"momentum": 0.7}, {"momentum": 0.7, "nesterov": True}, {"weight_decay": 0.2}]
)
def test_sgd_is_torchs(settings):
    settings = {"momentum": 0.9, "weight_decay": 0.0} | settings
    mine = trained(lambda model: sgd(model, 0.01, no_decay=(), **settings), dtype=torch.float64)
    theirs = trained(lambda model: torch.optim.SGD(model.parameters(), 0.01, **settings), dtype=torch.float64)
    assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_sgd_without_momentum_remembers_nothing_of_elements():
    model = TinyModel()
    optimizer = sgd(model, 0.1, momentum=0.0)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    optimizer.step()
    assert set(optimizer.state[model.head.weight]) == {"step"}


def test_lion_is_the_published_formula_in_float64():
    mine = trained(lambda model: lion(model, 0.01, (0.8, 0.95), 0.3, no_decay=()), dtype=torch.float64)
    start = {name: value.detach().double() for name, value in TinyModel().named_parameters()}
    momenta = {name: torch.zeros_like(value) for name, value in start.items()}
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        for name, value in start.items():
            gradient = torch.randn(value.shape, generator=generator).double()
            direction = torch.sign(0.8 * momenta[name] + 0.2 * gradient)
            rate = 0.01 * (1 - step / 10)
            start[name] = value - rate * (direction + 0.3 * value)
            momenta[name] = 0.95 * momenta[name] + 0.05 * gradient
    assert_close({name: value.detach() for name, value in mine.items()}, start, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("update_scale", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs_on_one_rank(update_scale, nesterov):
    settings = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.3}
    mine = trained(lambda model: muon(model, 0.02, update_scale=update_scale, **settings))
    theirs = trained(lambda model: TorchMuon(model, update_scale, settings))
    assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


class TorchMuon:
    """torch.optim.Muon for the one matrix, torch.optim.AdamW for the rest, in two optimizers."""

    def __init__(self, model, update_scale, settings):
        matrices = torch.optim.Muon([model.hidden.weight], 0.02, adjust_lr_fn=update_scale, **settings)
        vectors = [value for name, value in model.named_parameters() if name not in ("hidden.weight", "head.weight")]
        groups = [{"params": [model.head.weight], "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
        self.parts = [matrices, torch.optim.AdamW(groups, 0.02, betas=(0.9, 0.95), eps=1e-8)]
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()


def test_muon_of_a_wide_model_leaves_orthogonal_updates():
    model = torch.nn.Linear(48, 80, bias=False)
    before = model.weight.detach().clone()
    model.weight.grad = torch.randn(80, 48, generator=torch.Generator().manual_seed(0))
    muon(model, 0.1, weight_decay=0.0, update_scale="original").step()
    singular = torch.linalg.svdvals((model.weight.detach() - before) / (-0.1 * (80 / 48) ** 0.5))
    assert singular.min() > 0.6 and singular.max() < 1.3


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (3, 20, 50), (3, 50, 20)])
def test_orthogonalize_is_near_the_polar_factor(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    polar = left @ right
    found = orthogonalize(matrix).double()
    # The iteration brings singular values to about 0.7 to 1.2 only: directions agree, lengths nearly.
    cosine = (found * polar).sum((-2, -1)) / (found.norm(dim=(-2, -1)) * polar.norm(dim=(-2, -1)))
    assert (cosine > 0.98).all()
    assert not orthogonalize(torch.zeros(shape)).any()


def test_a_stack_of_experts_is_a_matrix_each():
    torch.manual_seed(0)
    stack = torch.nn.ParameterDict({"experts": torch.nn.Parameter(torch.randn(3, 8, 5))})
    single = torch.nn.ParameterDict({f"e{at}": torch.nn.Parameter(stack["experts"][at].clone()) for at in range(3)})
    stack["experts"].grad = torch.randn(3, 8, 5)
    for at in range(3):
        single[f"e{at}"].grad = stack["experts"].grad[at].clone()
    for model in (stack, single):
        muon(model, 0.1).step()
    for at in range(3):
        torch.testing.assert_close(stack["experts"][at], single[f"e{at}"], rtol=1e-2, atol=1e-3)


def test_a_closure_is_called_with_gradients():
    model = TinyModel()
    optimizer = lion(model, 0.01)

    def closure():
        optimizer.zero_grad()
        loss = model.head.weight.square().sum()
        loss.backward()
        return loss

    before = model.head.weight.square().sum().item()
    assert optimizer.step(closure).item() == pytest.approx(before)
    assert model.head.weight.square().sum() < before
