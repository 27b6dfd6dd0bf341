"""Precision of the plain executor: working copies, autocast, fp16 with its scaler, bfloat16 weights."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_parts import TinyBatches, TinyModel, summed_cross_entropy

from modalities_core.errors import CheckpointError, ConfigError
from modalities_core.interfaces import LossSum
from modalities_core.training.executor import Plain
from modalities_core.training.precision import WorkingCopies, computes_bf16
from modalities_core.training.scaler import GradientScaler
from modalities_core.training.world import Alone

CPU = torch.device("cpu")


class TiedModel(TinyModel):
    """The head has the embedding's weight, under a second name."""

    def __init__(self):
        super().__init__()
        self.head.weight = self.embedding.weight


def executor(precision, model=None, loss=summed_cross_entropy, **more):
    return Plain(model or TinyModel(), loss, Alone("cpu"), precision=precision, **more)


def train(precision, steps=40, micro_batch_size=4, lr=0.05, before=None, model=None):
    """Mean losses; each step as the loop takes it."""
    plain = executor(precision, model)
    parameters = list(plain.model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    batches, losses = TinyBatches(8, micro_batch_size), []
    for step in range(steps):
        if before is not None:
            before(step, plain)
        sums = plain.forward_backward(batches.micro_batches(step % 4))
        scale = 1.0 if plain.scaler is None else plain.scaler.scale
        for parameter in parameters:
            parameter.grad /= sums.tokens * scale
        overflowed = torch.tensor(not all(parameter.grad.isfinite().all() for parameter in parameters))
        if not overflowed:
            optimizer.step()
        if plain.scaler is not None:
            plain.scaler.update(overflowed)
        optimizer.zero_grad(set_to_none=True)
        losses.append((sums.loss / sums.tokens).item())
    return losses, plain


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.03), ("bf16_autocast", 0.03), ("fp16", 0.005)])
def test_every_precision_follows_float32(precision, tolerance):
    exact, _ = train("fp32")
    found, plain = train(precision)
    assert plain.precision == precision
    assert exact[-1] < exact[0] - 0.5
    assert found == pytest.approx(exact, rel=tolerance)
    assert found != exact
    assert {value.dtype for value in plain.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", [TinyModel, TiedModel])
def test_copies_compute_what_a_bfloat16_model_computes(kind):
    batch = TinyBatches().micro_batches(0)[0]
    whole = kind().bfloat16()
    expected = summed_cross_entropy(whole(batch.tokens_BT), whole.head, batch).loss
    expected.backward()
    plain = executor("bf16", kind())
    sums = plain.forward_backward([batch])
    assert sums.loss.item() == expected.item()
    for ours, theirs in zip(plain.model.parameters(), whole.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        # A tied weight's two gradients are added in float32 here, in bfloat16 there.
        torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=0 if kind is TinyModel else 0.01, atol=0)
    assert plain.evaluate(batch).loss.item() == expected.item()


def test_gradients_of_micro_batches_add_up_in_float32():
    batches = TinyBatches(64, 1).micro_batches(0)
    plain = executor("bf16")
    plain.forward_backward(batches)
    for index, parameter in enumerate(plain.model.parameters()):
        total = torch.zeros_like(parameter)
        for batch in batches:
            whole = TinyModel().bfloat16()
            summed_cross_entropy(whole(batch.tokens_BT), whole.head, batch).loss.backward()
            total += list(whole.parameters())[index].grad.float()
        torch.testing.assert_close(parameter.grad, total, rtol=1e-6, atol=1e-7)


def test_outside_of_a_step_everybody_sees_the_masters():
    model = TiedModel()
    names, masters = list(model.state_dict()), list(model.parameters())
    seen = []

    def loss(hidden_BTD, head, batch):
        seen.append({value.dtype for value in model.parameters()})
        assert head.weight is model.embedding.weight
        return summed_cross_entropy(hidden_BTD, head, batch)

    plain = executor("bf16", model, loss)
    during = []
    plain.after_first = lambda _: during.append([value.grad.clone() for value in model.parameters()])
    batches = TinyBatches(8, 4).micro_batches(0)
    plain.forward_backward(batches)
    assert seen == [{torch.bfloat16}] * 2
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(masters, model.parameters(), strict=True))
    alone = executor("bf16", TiedModel())
    alone.forward_backward(batches[:1])
    for first, only in zip(during[0], alone.model.parameters(), strict=True):
        assert torch.equal(first, only.grad)


def test_an_error_in_the_loss_leaves_the_masters_in_place():
    model = TinyModel()
    masters = list(model.parameters())
    plain = executor("bf16", model, lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plain.forward_backward(TinyBatches().micro_batches(0))
    assert all(a is b for a, b in zip(masters, model.parameters(), strict=True))


def test_evaluation_sees_weights_that_changed_since_the_step():
    plain, batch = executor("bf16"), TinyBatches().micro_batches(0)[0]
    before = plain.evaluate(batch).loss.item()
    with torch.no_grad():
        plain.model.head.weight.mul_(2)
    after = plain.evaluate(batch).loss.item()
    assert after != before
    plain.model.head.weight.data.div_(2)
    plain.restore({})  # as after a checkpoint was loaded, by whatever means
    assert plain.evaluate(batch).loss.item() == before


def test_a_frozen_weight_gets_no_gradient_and_one_thawed_later_does():
    plain, batch = executor("bf16"), TinyBatches().micro_batches(0)[0]
    plain.model.embedding.weight.requires_grad_(False)
    plain.forward_backward([batch])
    assert plain.model.embedding.weight.grad is None and plain.model.head.weight.grad is not None
    plain.model.embedding.weight.requires_grad_(True)
    plain.forward_backward([batch])
    assert plain.model.embedding.weight.grad is not None


def test_a_master_that_is_read_directly_gets_both_gradients():
    model = TinyModel()
    weight = model.head.weight

    def loss(hidden_BTD, head, batch):
        total, tokens = summed_cross_entropy(hidden_BTD, head, batch)
        return LossSum(total + 0.1 * weight.square().sum(), tokens)

    plain, batch = executor("bf16", model, loss), TinyBatches().micro_batches(0)[0]
    plain.forward_backward([batch, batch])
    other = executor("bf16")
    other.forward_backward([batch, batch])
    torch.testing.assert_close(weight.grad, other.model.head.weight.grad + 0.4 * weight.detach())


class MixingModel(TinyModel):
    """Multiplies by a float32 buffer, which only autocast forgives; counts its forwards."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.ones(8))
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens_BT):
        self.forwards += 1
        return self.hidden(self.embedding(tokens_BT) * self.factor)


def test_a_model_that_mixes_dtypes_is_told_or_gets_autocast(monkeypatch, caplog):
    batch = TinyBatches().micro_batches(0)[0]
    with pytest.raises(ConfigError, match="bf16_autocast"):
        executor("bf16", MixingModel()).forward_backward([batch])
    monkeypatch.setattr("modalities_core.training.precision.computes_bf16", lambda device: True)
    plain = executor("auto", MixingModel())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING, "modalities"):
        sums = plain.forward_backward([batch])
    assert plain.precision == "bf16_autocast" and "MixingModel" in caplog.text
    assert plain.model.forwards.item() == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert sums.loss.item() == executor("bf16_autocast", MixingModel()).forward_backward([batch]).loss.item()


def test_auto_says_what_it_took(caplog):
    plain = executor("auto")
    assert plain.precision == ("bf16" if computes_bf16(CPU) else "fp32")
    with caplog.at_level(logging.INFO, "modalities"):
        plain.prepare(10, 100)
    assert f"precision {plain.precision}" in caplog.text
    assert executor("auto", TinyModel().double()).precision == "fp32"


def test_bfloat16_weights_are_the_same_objects():
    model = TinyModel()
    model.register_buffer("count", torch.zeros(2))
    before = list(model.parameters())
    plain = executor("bf16_weights", model)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert model.count.dtype == torch.float32
    batch = TinyBatches().micro_batches(0)[0]
    whole = TinyModel().bfloat16()
    expected = summed_cross_entropy(whole(batch.tokens_BT), whole.head, batch).loss
    assert plain.forward_backward([batch]).loss.item() == expected.item()
    assert {value.grad.dtype for value in model.parameters()} == {torch.bfloat16}


def test_a_precision_that_contradicts_the_wrapper_is_refused():
    model = TinyModel()
    model.computing_dtype = torch.float32
    with pytest.raises(ConfigError, match="param_dtype to bf16"):
        executor("bf16", model)
    model.computing_dtype = torch.bfloat16
    assert executor("fp32", model).precision == executor("auto", model).precision == "bf16"


def test_a_meta_model_is_only_checked():
    with torch.device("meta"):
        model = TinyModel()
    for precision in ("bf16", "bf16_weights", "fp16", "auto"):
        executor(precision, model)
    assert {(value.device.type, value.dtype) for value in model.parameters()} == {("meta", torch.float32)}


def test_copies_leave_what_is_not_wider_alone():
    module = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).bfloat16()])
    module[0].register_parameter("index", nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False))
    copies = WorkingCopies(module, torch.bfloat16)
    copies.refresh()
    with copies.standing():
        assert {value.dtype for value in module.parameters()} == {torch.bfloat16, torch.int64}
    assert module[0].weight.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------- fp16


def test_the_scaler_moves_as_torchs():
    torch.manual_seed(0)
    ours = GradientScaler(CPU, initial=1024.0, interval=3)
    scale, tracker = torch.tensor(1024.0), torch.tensor(0, dtype=torch.int32)
    for bad in (torch.rand(200) < 0.2).float():
        ours.update(bad)
        torch._amp_update_scale_(scale, tracker, bad, 2.0, 0.5, 3)
        assert ours.scale.item() == min(scale.item(), 2.0**24)


def test_the_scale_has_a_floor_and_a_ceiling():
    scaler = GradientScaler(CPU, initial=4.0, interval=1, smallest=1.0)
    for _ in range(5):
        scaler.update(torch.tensor(True))
    assert scaler.scale.item() == 1.0
    for _ in range(40):
        scaler.update(torch.tensor(0.0))
    assert scaler.scale.item() == 2.0**24
    with pytest.raises(ConfigError, match="backoff"):
        GradientScaler(CPU, backoff=2.0)


def test_the_scale_starts_by_the_tokens_once():
    scaler = GradientScaler(CPU)
    scaler.start(16384)
    assert scaler.scale.item() == 4.0
    scaler.start(1)
    assert scaler.scale.item() == 4.0
    restored = GradientScaler(CPU)
    restored.restore(scaler.state())
    restored.start(1)
    assert restored.scale.item() == 4.0


def test_gradients_under_fp16_are_scaled_and_the_loss_is_not():
    batches = TinyBatches().micro_batches(0)
    plain, exact = executor("fp16"), executor("fp32")
    ours, reference = plain.forward_backward(batches), exact.forward_backward(batches)
    tokens = batches[0].tokens_BT.numel()
    assert plain.scaler.scale.item() == 2.0 ** ((65536 // tokens).bit_length() - 1)
    assert ours.loss.item() == pytest.approx(reference.loss.item(), rel=1e-3)
    for scaled, value in zip(plain.model.parameters(), exact.model.parameters(), strict=True):
        difference = scaled.grad / plain.scaler.scale - value.grad
        assert difference.norm() < 0.01 * value.grad.norm()


def test_small_gradients_survive_by_the_scale():
    """A loss of 1e-7 a token has gradients below float16's smallest number."""

    def tiny(hidden_BTD, head, batch):
        loss, tokens = summed_cross_entropy(hidden_BTD, head, batch)
        return LossSum(loss * 1e-7, tokens)

    batches = TinyBatches().micro_batches(0)
    norms = {}
    for scale in (1.0, 2.0**16):
        plain = executor("fp16", loss=tiny)
        plain.restore({"scaler": {"scale": scale, "good_steps": 0, "started": True}})
        plain.forward_backward(batches)
        norms[scale] = plain.model.hidden.weight.grad.norm().item() / scale
    exact = executor("fp32", loss=tiny)
    exact.forward_backward(batches)
    wanted = exact.model.hidden.weight.grad.norm().item()
    assert norms[2.0**16] == pytest.approx(wanted, rel=0.01)
    assert abs(norms[1.0] - wanted) > 0.2 * wanted


def test_a_scale_that_is_far_too_large_backs_off_and_training_goes_on():
    def force(step, plain):
        if step == 0:
            plain.restore({"scaler": {"scale": 2.0**24, "good_steps": 0, "started": True}})
        if step == 1:
            for after, initial in zip(plain.model.parameters(), TinyModel().parameters(), strict=True):
                assert torch.equal(after, initial), "the first step overflowed and changed nothing"

    losses, plain = train("fp16", before=force)
    assert plain.scaler.scale.item() < 2.0**24
    assert losses[-1] < losses[0] - 0.5


def test_fp16_continues_bit_for_bit():
    def trained(first, last, plain, optimizer, batches):
        losses = []
        for step in range(first, last):
            sums = plain.forward_backward(batches.micro_batches(step))
            for parameter in plain.model.parameters():
                parameter.grad /= sums.tokens * plain.scaler.scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            plain.scaler.update(torch.tensor(step == 3))
            losses.append(sums.loss.item())
        return losses

    def parts():
        plain = executor("fp16")
        plain.scaler.interval = 4
        return plain, torch.optim.AdamW(plain.model.parameters(), lr=0.01)

    batches = TinyBatches()
    plain, optimizer = parts()
    unbroken = trained(0, 12, plain, optimizer, batches)
    first, first_optimizer = parts()
    losses = trained(0, 6, first, first_optimizer, batches)
    second, second_optimizer = parts()
    second.model.load_state_dict(first.model.state_dict())
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    second.restore(first.state())
    losses += trained(6, 12, second, second_optimizer, batches)
    assert losses == unbroken
    assert second.state() == plain.state()
    assert plain.state()["scaler"]["scale"] > 1


def test_a_damaged_state_of_the_scaler_is_refused():
    plain = executor("fp16")
    for damage in ({"scale": "x"}, {"scale": 0.0}, {"good_steps": None}):
        state = {"scale": 1.0, "good_steps": 0, "started": True} | damage
        with pytest.raises(CheckpointError, match="scaler"):
            plain.restore({"scaler": state})


# ------------------------------------------------------------------------------------------------- waiting for nothing


class NoNumbers(TorchDispatchMode):
    """Fails where a number leaves the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_autocast", "bf16_weights", "fp16"])
def test_the_host_reads_nothing_in_a_step(precision):
    plain, batches = executor(precision), TinyBatches().micro_batches(0)
    plain.forward_backward(batches)
    with NoNumbers():
        plain.forward_backward(batches)
        plain.evaluate(batches[0])
        if plain.scaler is not None:
            plain.scaler.update(torch.tensor(True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["bf16", "bf16_autocast", "bf16_weights", "fp16"])
def test_on_a_gpu_the_host_waits_for_nothing_and_the_loss_is_that_of_the_cpu(precision):
    world = Alone("cuda")
    plain = Plain(TinyModel(), summed_cross_entropy, world, precision=precision)
    batches = [batch.to(world.device) for batch in TinyBatches().micro_batches(0)]
    first = plain.forward_backward(batches)
    overflowed = torch.zeros((), device=world.device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plain.forward_backward(batches)
        plain.evaluate(batches[0])
        if plain.scaler is not None:
            plain.scaler.update(overflowed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = executor("fp32").forward_backward(TinyBatches().micro_batches(0))
    assert first.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)
