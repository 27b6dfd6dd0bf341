"""Sums, gradients and modes of the plain executor; the world of one process."""

import math
from dataclasses import replace

import pytest
import torch
from training_parts import TinyBatches, TinyModel, summed_cross_entropy

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Executor, LossSum, World
from modalities_core.training.executor import Plain
from modalities_core.training.precision import computes_bf16
from modalities_core.training.world import Alone


def gradients(micro_batch_size, weighted=True):
    model = TinyModel().double()
    executor = Plain(model, summed_cross_entropy, Alone("cpu"))
    sums = executor.forward_backward(TinyBatches(8, micro_batch_size, weighted=weighted).micro_batches(3))
    return model, sums


def test_satisfies_the_protocols():
    assert isinstance(Alone("cpu"), World)
    assert isinstance(Plain(TinyModel(), summed_cross_entropy, Alone("cpu")), Executor)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 8])
def test_gradient_over_micro_batches_is_that_of_the_mean_loss_of_one_batch(micro_batch_size, weighted):
    model, sums = gradients(micro_batch_size, weighted)
    oracle = TinyModel().double()
    batch = TinyBatches(8, 8, weighted=weighted).micro_batches(3)[0]
    logits = oracle.head(oracle(batch.tokens_BT)).flatten(0, 1)
    counts = batch.weights_BT.flatten() == 1 if weighted else slice(None)
    mean = torch.nn.functional.cross_entropy(logits[counts], batch.targets_BT.flatten()[counts])
    mean.backward()
    assert (sums.loss / sums.tokens).item() == pytest.approx(mean.item(), rel=1e-6)
    assert not sums.loss.requires_grad
    for ours, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(ours.grad / sums.tokens.double(), theirs.grad, rtol=1e-10, atol=1e-14)


def test_reduction_waits_for_the_last_micro_batch():
    class Sharded(TinyModel):
        def __init__(self):
            super().__init__()
            self.calls = []

        def set_requires_gradient_sync(self, value):
            self.calls.append(value)

    model = Sharded()
    Plain(model, summed_cross_entropy, Alone("cpu")).forward_backward(TinyBatches(6, 2).micro_batches(0))
    assert model.calls == [False, False, True]


def test_evaluation_has_no_dropout_no_gradients_and_leaves_the_mode():
    model = TinyModel(dropout=0.5)
    executor = Plain(model, summed_cross_entropy, Alone("cpu"))
    batch = TinyBatches().micro_batches(0)[0]
    first, second = executor.evaluate(batch), executor.evaluate(batch)
    assert first.loss.item() == second.loss.item()
    assert model.training
    assert all(value.grad is None for value in model.parameters())


def test_what_a_loss_has_for_evaluation_is_reported_and_not_what_it_optimises():
    class Penalised:
        evaluation = staticmethod(summed_cross_entropy)

        def __call__(self, hidden_BTD, head, batch):
            loss, tokens = summed_cross_entropy(hidden_BTD, head, batch)
            return LossSum(loss + tokens, tokens)

    batch = TinyBatches().micro_batches(0)[0]
    plain = Plain(TinyModel(), summed_cross_entropy, Alone("cpu")).evaluate(batch)
    executor = Plain(TinyModel(), Penalised(), Alone("cpu"))
    assert executor.evaluate(batch).loss.item() == plain.loss.item()
    trained = executor.forward_backward([batch])
    assert trained.loss.item() == pytest.approx((plain.loss + plain.tokens).item())


def test_a_world_that_sees_data_twice_gives_half_the_sums():
    class Doubled(Alone):
        def __init__(self):
            super().__init__("cpu")
            self.size = 2

    batch = TinyBatches().micro_batches(0)[0]
    whole = Plain(TinyModel(), summed_cross_entropy, Alone("cpu")).evaluate(batch)
    half = Plain(TinyModel(), summed_cross_entropy, Doubled()).evaluate(batch)
    assert [value.item() for value in half] == [value.item() / 2 for value in whole]


def test_bf16_computes_in_bf16_and_keeps_float32_weights_and_gradients():
    seen = []

    def loss(hidden_BTD, head, batch):
        seen.append(head(hidden_BTD).dtype)
        return summed_cross_entropy(hidden_BTD, head, batch)

    model = TinyModel()
    executor = Plain(model, loss, Alone("cpu"), precision="bf16")
    exact = Plain(TinyModel(), summed_cross_entropy, Alone("cpu"))
    batch = TinyBatches().micro_batches(0)[0]
    ours, reference = executor.forward_backward([batch]), exact.forward_backward([batch])
    assert seen == [torch.bfloat16]
    assert all(value.grad.dtype == torch.float32 for value in model.parameters())
    assert ours.loss.item() == pytest.approx(reference.loss.item(), rel=0.02)
    assert ours.loss.item() != reference.loss.item()


def test_auto_takes_what_the_device_computes():
    executor = Plain(TinyModel(), summed_cross_entropy, Alone("cpu"), precision="auto")
    assert executor.precision == ("bf16" if computes_bf16(torch.device("cpu")) else "fp32")
    assert not computes_bf16(torch.device("meta"))
    with pytest.raises(ConfigError, match="precision"):
        Plain(TinyModel(), summed_cross_entropy, Alone("cpu"), precision="fp8")


def test_meta_model_is_left_alone():
    with torch.device("meta"):
        model = TinyModel()
    Plain(model, summed_cross_entropy, Alone("cpu"))
    assert all(value.is_meta for value in model.parameters())


def test_alone_refuses_devices_that_are_not_there():
    with pytest.raises(ConfigError, match="warp"):
        Alone("warp")
    with pytest.raises(ConfigError, match="CUDA"):
        Alone(f"cuda:{torch.cuda.device_count() + 1}")
    assert Alone().device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_alone_measures_norms(order, dtype):
    model, _ = gradients(8)
    for parameter in model.parameters():
        gradient = parameter.grad.to(dtype)
        parameter.grad, parameter.data, parameter.grad = None, parameter.data.to(dtype), gradient
    whole = torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()])
    share = Alone("cpu").norm_share([*model.parameters(), torch.zeros(0)], order)
    norm = share if math.isinf(order) else share ** (1 / order)
    torch.testing.assert_close(norm, torch.linalg.vector_norm(whole, order), rtol=1e-6, atol=0)
    assert Alone("cpu").norm_share([torch.zeros(2)], order).item() == 0


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_norm_shows_what_is_not_finite_anywhere(order, poison):
    parameters = [torch.zeros(3), torch.zeros(0), torch.zeros(2)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    parameters[2].grad[1] = poison
    assert not torch.isfinite(Alone("cpu").norm_share(parameters, order))


class SegmentModel(TinyModel):
    """Remembers the segments it is given."""

    def forward(self, tokens_BT, segments_BT=None):
        self.seen = segments_BT
        return super().forward(tokens_BT)


def test_marked_documents_reach_the_model_or_are_refused():
    plain = TinyBatches(4, 4).micro_batches(0)[0]
    marked = replace(plain, segments_BT=torch.zeros_like(plain.tokens_BT, dtype=torch.int32))
    model = SegmentModel()
    executor = Plain(model, summed_cross_entropy, Alone("cpu"))
    executor.forward_backward([marked])
    assert torch.equal(model.seen, marked.segments_BT)
    executor.evaluate(plain)
    assert model.seen is None
    with pytest.raises(ConfigError, match="TinyModel cannot keep them apart"):
        Plain(TinyModel(), summed_cross_entropy, Alone("cpu")).evaluate(marked)


class ImageModel(TinyModel):
    """Remembers the images it was given."""

    def forward(self, tokens_BT, images_BCHW=None):
        self.seen = images_BCHW
        return super().forward(tokens_BT)


def test_images_reach_the_model_or_are_refused():
    plain = TinyBatches(4, 4).micro_batches(0)[0]
    pictured = replace(plain, images_BCHW=torch.zeros(4, 3, 2, 2, dtype=torch.uint8))
    model = ImageModel()
    executor = Plain(model, summed_cross_entropy, Alone("cpu"))
    executor.forward_backward([pictured])
    assert torch.equal(model.seen, pictured.images_BCHW)
    executor.evaluate(plain)
    assert model.seen is None
    with pytest.raises(ConfigError, match="TinyModel does not look at them"):
        Plain(TinyModel(), summed_cross_entropy, Alone("cpu")).forward_backward([pictured])
