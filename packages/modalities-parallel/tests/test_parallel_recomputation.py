"""Recomputed blocks give the same losses and gradients bit for bit, and keep what they should and no more."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from parallel_small_model import LOSSES, SmallModel, batch
from torch import nn

from modalities_core.errors import ConfigError
from modalities_core.interfaces import ParallelPlan
from modalities_core.training.executor import Plain
from modalities_core.training.world import Alone
from modalities_parallel.fsdp import fsdp2
from modalities_parallel.recomputation import selective, whole_blocks

CPU = Alone("cpu")
KINDS = {
    "whole": whole_blocks,
    "every_second": functools.partial(whole_blocks, every=2),
    "selective": selective,
    "products": functools.partial(selective, save=("aten.*mm",), every=None),
    "nothing": functools.partial(selective, save=()),
}


class Dropping(nn.Module):
    """A block with dropout, a buffer that its forward changes, and a keyword that must pass through."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, hidden_BTD: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        if self.training:
            self.seen.add_(1)
        update_BTD = F.dropout(torch.relu(self.inside(hidden_BTD)), 0.3, self.training)
        return hidden_BTD + (update_BTD if scale is None else update_BTD * scale)


class WithDropout(SmallModel):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Dropping(block) for block in self.blocks)

    def forward(self, tokens_BT):
        hidden_BTD = self.embedding(tokens_BT) * self.scale
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD, scale=self.scale / 2)
        return self.norm(hidden_BTD)

    def initial_values(self):
        yield from super().initial_values()
        yield from ((f"blocks.{n}.seen", torch.zeros((), dtype=torch.int64)) for n in range(len(self.blocks)))


def built(kind=SmallModel, around=None):
    model = kind()
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, value in model.initial_values():
            values[name].copy_(value)
    return model if around is None else around(model)


def trained(model, precision="fp32", loss="weighted", compile="none", world=CPU):
    """Losses, gradients of two micro batches and the buffers afterwards."""
    executor = Plain(model, LOSSES[loss], world, precision=precision, compile=compile)
    torch.manual_seed(5)
    losses = [executor.forward_backward([batch(step, 0, 6), batch(step, 6, 6)]).loss for step in range(2)]
    return losses, [value.grad for value in model.parameters()], list(model.buffers())


def assert_same(found, expected):
    for ours, others in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_autocast", "bf16_weights", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_without_recomputation(kind, precision):
    assert_same(trained(built(around=KINDS[kind]), precision), trained(built(), precision))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_repeated_and_buffers_count_once(kind):
    found, expected = trained(built(WithDropout, KINDS[kind]), "bf16"), trained(built(WithDropout), "bf16")
    assert_same(found, expected)
    assert [int(value) for value in found[2] if value.dtype == torch.int64] == [4, 4, 4]


def test_random_numbers_after_a_step_are_those_without_recomputation():
    after = []
    for around in (None, whole_blocks, selective):
        trained(built(WithDropout, around))
        after.append(torch.rand(4))
    assert torch.equal(after[0], after[1]) and torch.equal(after[0], after[2])


@pytest.mark.parametrize("order", ["inside", "outside"])
@pytest.mark.parametrize("param_dtype", ["fp32", "bf16"])
def test_it_nests_with_fsdp2_in_one_process(order, param_dtype):
    def build():
        return SmallModel() if order == "outside" else whole_blocks(SmallModel())

    model = fsdp2(build, CPU, param_dtype)
    model = whole_blocks(model) if order == "outside" else model
    assert_same(trained(model, loss="chunked"), trained(fsdp2(SmallModel, CPU, param_dtype), loss="chunked"))


def runs(model, call):
    """How often the blocks' own attention is computed while ``call`` runs."""
    count = 0
    own = F.scaled_dot_product_attention

    def counted(*arguments, **keywords):
        nonlocal count
        count += 1
        return own(*arguments, **keywords)

    F.scaled_dot_product_attention = counted
    try:
        call(model)
    finally:
        F.scaled_dot_product_attention = own
    return count


@pytest.mark.parametrize(("kind", "expected"), [("whole", 6), ("every_second", 4), ("selective", 6)])
def test_only_the_blocks_meant_run_again(kind, expected):
    model = built(around=KINDS[kind])
    tokens = batch(0, 0, 2).tokens_BT
    assert runs(model, lambda m: m(tokens).sum().backward()) == expected
    with torch.no_grad():
        assert runs(model, lambda m: m(tokens)) == 3
    model.eval()
    assert runs(model, lambda m: m(tokens).sum().backward()) == 3


def test_names_parameters_and_classes_stay():
    plain, model = built(), built()
    parameters = list(model.parameters())
    assert whole_blocks(model) is model
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert repr(model) == repr(plain)
    assert isinstance(model.blocks[0], type(plain.blocks[0]))
    assert type(model.blocks[0]) is type(model.blocks[1])  # so that compiled ones share a graph


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["whole", "selective"])
@pytest.mark.slow
def test_compiled_blocks_recompute_too(kind, precision):
    losses, gradients, buffers = trained(built(WithDropout, KINDS[kind]), precision, compile="blocks")
    expected = trained(built(WithDropout), precision, compile="blocks")
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    if precision == "bf16":
        close = functools.partial(torch.testing.assert_close, rtol=0.03, atol=0.1)
    for ours, others in zip(losses, expected[0], strict=True):
        close(ours, others)
    for ours, others in zip(gradients, expected[1], strict=True):
        close(ours, others)
    assert [int(value) for value in buffers if value.dtype == torch.int64] == [4, 4, 4]


@pytest.mark.slow
def test_sharded_over_one_and_two_ranks(on_ranks):
    for ranks in (1, 2):
        pairs = {kind: on_ranks(ranks, "execute", recomputed=kind) for kind in ("none", "whole_blocks", "selective")}
        for kind in ("whole_blocks", "selective"):
            for found, expected in zip(pairs[kind], pairs["none"], strict=True):
                assert found == expected, kind


def test_wrong_arguments_are_refused():
    with pytest.raises(ConfigError, match="every is 4"):
        whole_blocks(built(), every=4)
    with pytest.raises(ConfigError, match="every is 0"):
        selective(built(), every=0)
    with pytest.raises(ConfigError, match="no operation of torch") as refused:
        selective(built(), save=("aten.addmmm",))
    assert "aten.addmm" in refused.value.hint
    with pytest.raises(ConfigError, match="no operation of torch"):
        selective(built(), save=("mm",))
    selective(built(), save=("somebody_elses.attention",))
    with pytest.raises(ConfigError, match="already"):
        selective(whole_blocks(built()))


def test_a_model_without_blocks_is_refused():
    class Bare(SmallModel):
        def parallel_plan(self):
            return ParallelPlan()

    with pytest.raises(ConfigError, match="nothing to recompute"):
        whole_blocks(Bare())
