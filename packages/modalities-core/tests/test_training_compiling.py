"""Compiled blocks: when they are wanted, where they stand, and what is said where they cannot be had."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from training_parts import TinyBatches, TinyModel, summed_cross_entropy

from modalities_core.errors import ConfigError
from modalities_core.interfaces import ParallelPlan
from modalities_core.training.compiling import blocks_of, compile_obstacle, worth_compiling
from modalities_core.training.executor import Plain
from modalities_core.training.world import Alone

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(bool(compile_obstacle(CPU)), reason="needs a C++ compiler")


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, hidden_BTD):
        return hidden_BTD + self.down(torch.tanh(self.up(self.norm(hidden_BTD))))


class Blocks(TinyModel):
    """The tiny model with two blocks in the middle."""

    def __init__(self, kind=Block):
        super().__init__()
        del self.hidden
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(kind(8) for _ in range(2))

    def forward(self, tokens_BT):
        hidden_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD)
        return self.norm(hidden_BTD)

    def parallel_plan(self):
        return ParallelPlan(blocks=("blocks.*",))


class Breaking(Block):
    """What cannot be compiled in one graph."""

    def forward(self, hidden_BTD):
        torch._dynamo.graph_break()
        return super().forward(hidden_BTD)


def executor(model=None, compile="blocks", **more):
    return Plain(model or Blocks(), summed_cross_entropy, Alone("cpu"), compile=compile, **more)


def test_blocks_are_the_outermost_that_the_plan_names():
    model = Blocks()
    model.parallel_plan = lambda: ParallelPlan(blocks=("blocks.*", "blocks.*.up"))
    assert blocks_of(model) == list(model.blocks)


def test_a_plan_without_blocks_is_refused():
    with pytest.raises(ConfigError, match="no blocks"):
        executor(TinyModel())
    with pytest.raises(ConfigError, match="auto, blocks or none"):
        executor(compile="all")


def test_a_machine_without_a_compiler_is_told(monkeypatch, caplog):
    monkeypatch.setattr("modalities_core.training.compiling.shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler"):
        executor()
    plain = executor(compile="auto")
    with caplog.at_level(logging.INFO, "modalities"):
        plain.prepare(10**9, 10**9)
    assert "no C++ compiler" in caplog.text and plain.state()["compile"] == "none"
    with torch.device("meta"):
        Plain(Blocks(), summed_cross_entropy, Alone(), compile="blocks")  # checked on another machine than it runs on


def test_auto_weighs_the_length_of_the_run():
    for device in (CPU, torch.device("cuda")):
        answers = [worth_compiling(device, True, 10.0**power)[0] for power in range(9, 24)]
        assert answers[0] is False and answers[-1] is True
        assert answers == sorted(answers)


@needs_compiler
def test_auto_decides_by_the_whole_run_and_keeps_the_choice_of_a_checkpoint(caplog):
    plain = executor(compile="auto")
    with caplog.at_level(logging.INFO, "modalities"):
        plain.prepare(10, 100)
    assert plain.state()["compile"] == "none" and "compile none" in caplog.text
    plain.prepare(10**9, 10**9)
    assert plain.state()["compile"] == "blocks"
    resumed = executor(compile="auto")
    resumed.restore(plain.state())
    resumed.prepare(10, 100)
    assert resumed.state()["compile"] == "blocks"


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_blocks_compute_the_same_under_the_same_names(precision):
    compiled, eager = executor(precision=precision), executor(compile="none", precision=precision)
    names, batches = list(compiled.model.state_dict()), TinyBatches(8, 4)
    near = 1e-5 if precision == "fp32" else 0.03
    for step in range(3):
        for plain in (compiled, eager):
            plain.sums = plain.forward_backward(batches.micro_batches(step))
        assert compiled.sums.loss.item() == pytest.approx(
            eager.sums.loss.item(), rel=1e-5 if precision == "fp32" else 0.01
        )
        for ours, theirs in zip(compiled.model.parameters(), eager.model.parameters(), strict=True):
            assert (ours.grad - theirs.grad).norm() <= near * theirs.grad.norm()
    batch = batches.micro_batches(9)[0]
    assert compiled.evaluate(batch).loss.item() == pytest.approx(eager.evaluate(batch).loss.item(), rel=0.01)
    assert list(compiled.model.state_dict()) == names
    assert all("forward" not in block.__dict__ for block in compiled.model.blocks)


@needs_compiler
def test_a_block_that_cannot_be_compiled_is_told_or_left_as_it_is(caplog):
    batch = TinyBatches().micro_batches(0)[0]
    with pytest.raises(ConfigError, match="a block of Blocks cannot be compiled"):
        executor(Blocks(Breaking)).forward_backward([batch])
    plain = executor(Blocks(Breaking), compile="auto")
    plain.prepare(10**9, 10**9)
    with caplog.at_level(logging.WARNING, "modalities"):
        sums = plain.forward_backward([batch])
    assert plain.state()["compile"] == "none" and "compile none" in caplog.text
    eager = executor(Blocks(Breaking), compile="none")
    assert sums.loss.item() == eager.forward_backward([batch]).loss.item()
    for ours, theirs in zip(plain.model.parameters(), eager.model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@needs_compiler
def test_a_forward_of_the_blocks_own_is_put_back():
    model = Blocks()
    own = model.blocks[0].forward
    model.blocks[0].forward = own
    plain = executor(model)
    assert plain._compiled is not None
    with plain._compiled.standing():
        assert model.blocks[0].__dict__["forward"] is not own and "forward" in model.blocks[1].__dict__
    assert model.blocks[0].__dict__["forward"] is own and "forward" not in model.blocks[1].__dict__
