"""AdamW's groups and numbers."""

import pytest
import torch
from training_parts import TinyModel

from modalities_core.errors import ConfigError
from modalities_core.training.optim import adamw, hyperparameters, restore_hyperparameters, set_learning_rates


def test_update_is_that_of_the_published_formula_in_float64():
    model = TinyModel().double()
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = adamw(model, lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in start.items()}
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 4):
        for name, value in model.named_parameters():
            value.grad = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            decay = 0.3 if name in ("hidden.weight", "head.weight") else 0.0
            first, second = moments[name]
            first.mul_(0.8).add_(value.grad, alpha=0.2)
            second.mul_(0.9).add_(value.grad**2, alpha=0.1)
            corrected = (second / (1 - 0.9**step)).sqrt() + 1e-6
            start[name] = start[name] * (1 - 0.01 * decay) - 0.01 * first / (1 - 0.8**step) / corrected
        optimizer.step()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), start[name], rtol=1e-12, atol=1e-14)


def test_norms_biases_and_embeddings_do_not_decay():
    model = TinyModel()
    groups = adamw(model, lr=1.0).param_groups
    names = {id(value): name for name, value in model.named_parameters()}
    found = [{names[id(value)] for value in group["params"]} for group in groups]
    assert found == [
        {"hidden.weight", "head.weight"},
        {"embedding.weight", "hidden.bias", "norm.weight", "norm.bias"},
    ]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_globs_of_the_user_have_to_match():
    model = TinyModel()
    assert len(adamw(model, lr=1.0, no_decay=("head.*",)).param_groups[1]["params"]) == 1
    with pytest.raises(ConfigError, match=r"'haed\.\*'"):
        adamw(model, lr=1.0, no_decay=("head.*", "haed.*"))


def test_frozen_parameters_are_left_out():
    model = TinyModel()
    model.embedding.requires_grad_(False)
    count = sum(len(group["params"]) for group in adamw(model, lr=1.0).param_groups)
    assert count == 5
    with pytest.raises(ConfigError, match="no parameter"):
        adamw(TinyModel().requires_grad_(False), lr=1.0)


def test_meta_model_gets_an_optimizer():
    with torch.device("meta"):
        model = TinyModel()
    assert len(adamw(model, lr=1.0).param_groups) == 2


@pytest.mark.parametrize(
    "numbers",
    [
        {"lr": 0.0},
        {"lr": float("nan")},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
        {"eps": 0.0},
        {"weight_decay": -1.0},
    ],
)
def test_numbers_out_of_range_are_refused(numbers):
    with pytest.raises(ConfigError, match=next(iter(numbers))):
        adamw(TinyModel(), **({"lr": 1.0} | numbers))


def test_configured_numbers_survive_an_older_state():
    old = adamw(TinyModel(), lr=1.0, weight_decay=0.5).state_dict()
    optimizer = adamw(TinyModel(), lr=0.1, weight_decay=0.2, betas=(0.1, 0.2))
    configured = hyperparameters(optimizer)
    optimizer.load_state_dict(old)
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    restore_hyperparameters(optimizer, configured)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert set_learning_rates(optimizer, [0.1, 0.2], 0.5) == 0.05
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1]
    assert optimizer.param_groups[0]["betas"] == (0.1, 0.2)
