from __future__ import annotations

import functools

import pytest
import torch
from parallel_small_model import SmallModel, batch, weighted_loss

from modalities_core.errors import ConfigError
from modalities_core.interfaces import CheckpointFormat, Model, World
from modalities_parallel.checkpoint.sharded import Sharded
from modalities_parallel.distributed import Distributed
from modalities_parallel.fsdp import fsdp2
from modalities_parallel.materialize import fill
from modalities_parallel.world import auto


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return auto()


def reference(tie: str) -> SmallModel:
    """The same model built and filled by hand."""
    model = SmallModel(tie)
    with torch.no_grad():
        for name, value in model.initial_values():
            {**dict(model.named_parameters()), **dict(model.named_buffers())}[name].copy_(value)
    return model


@pytest.mark.parametrize("tie", ["none", "read", "shared"])
def test_weights_are_the_initial_values(alone, tie):
    model = fsdp2(functools.partial(SmallModel, tie), alone, param_dtype="fp32")
    assert isinstance(model, SmallModel)
    assert isinstance(model, Model)
    expected = reference(tie).state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert torch.equal(model.position_D, reference(tie).position_D)
    assert (model.head.weight is model.embedding.weight) if tie == "shared" else True


def test_the_model_is_built_on_the_meta_device(alone):
    devices = []

    def build():
        model = SmallModel()
        devices.extend(parameter.device.type for parameter in model.parameters())
        return model

    fsdp2(build, alone)
    assert set(devices) == {"meta"}


@pytest.mark.parametrize("tie", ["none", "read"])
def test_bf16_is_autocast_over_float32_weights(alone, tie):
    model = fsdp2(functools.partial(SmallModel, tie), alone, param_dtype="bf16")
    exact, micro = reference(tie), batch(0, 0, 12)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = exact(micro.tokens_BT)
    with torch.autocast("cpu", torch.bfloat16):
        expected = exact.head(hidden.bfloat16())
    logits = model.head(model(micro.tokens_BT))
    assert model(micro.tokens_BT).dtype == logits.dtype == torch.bfloat16
    assert torch.equal(logits, expected)
    weighted_loss(model(micro.tokens_BT), model.head, micro).loss.backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def test_fp32_is_exact(alone):
    model, exact, micro = fsdp2(SmallModel, alone, param_dtype="fp32"), reference("none"), batch(0, 0, 12)
    assert torch.equal(model.head(model(micro.tokens_BT)), exact.head(exact(micro.tokens_BT)))


def test_values_that_do_not_fit_are_refused(alone):
    class Forgetful(SmallModel):
        def initial_values(self):
            return ((name, value) for name, value in super().initial_values() if name not in ("norm.weight", "scale"))

    class Wrong(SmallModel):
        def initial_values(self):
            return ((name, value[:1]) for name, value in super().initial_values())

    class Inventive(SmallModel):
        def initial_values(self):
            yield "bias", torch.zeros(1)

    with pytest.raises(ConfigError, match="no value for norm.weight, scale"):
        fsdp2(Forgetful, alone)
    with pytest.raises(ConfigError, match=r"'embedding.weight' the shape \(1, 14\), but it has \(61, 14\)"):
        fsdp2(Wrong, alone)
    with pytest.raises(ConfigError, match="gives 'bias', which Inventive does not have"):
        fsdp2(Inventive, alone)
    with pytest.raises(ConfigError, match="already built"):
        fsdp2(SmallModel(), alone)
    model = SmallModel()
    with pytest.raises(ConfigError, match="no value for"):
        fill(model, [])


def test_several_ranks_without_a_mesh_are_refused(alone):
    alone.size = 2
    with pytest.raises(ConfigError, match="Alone has 2 ranks but no device mesh"):
        fsdp2(SmallModel, alone)


def test_what_is_built_satisfies_the_protocols(alone):
    assert isinstance(alone, World)
    assert isinstance(Sharded(), CheckpointFormat)
    members = [name for name in dir(World) if not name.startswith("_") and callable(getattr(World, name))]
    assert members and all(callable(getattr(Distributed, name, None)) for name in members)
