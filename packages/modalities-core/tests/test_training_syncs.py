"""Between two reports the host never asks the device for a number."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_parts import Collector, TinyBatches, TinyHeldOut, TinyModel, TorchFiles, summed_cross_entropy

from modalities_core.events import CheckpointSaved, Evaluated, StepLogged
from modalities_core.training import ledger
from modalities_core.training.checkpointing import Checkpoints
from modalities_core.training.evaluator import Evaluation
from modalities_core.training.executor import Plain
from modalities_core.training.optim import adamw
from modalities_core.training.schedule import WarmupCosine
from modalities_core.training.trainer import Trainer
from modalities_core.training.world import Alone

LOG_EVERY, STEPS = 5, 20
# What is read after these steps may be waited for: reports, and two before them evaluations and checkpoints.
OBSERVED = {1, 5, 7, 10, 14, 15, 20}
# Not numpy: that is how the loop reads what has arrived in memory of the host.
ASKING = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu")


class Asked(TorchDispatchMode):
    """Notes every number that leaves a tensor, by whatever way."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            self.found.append(func.name())
        if func is torch.ops.aten._to_copy.default and args[0].device.type != "cpu":
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


class Marked(TinyBatches):
    """Tells which step is being computed; that of a number read after a step is still the step's."""

    def __init__(self, **options):
        super().__init__(**options)
        self.step = 0

    def micro_batches(self, step):
        self.step = step + 1
        return super().micro_batches(step)


def build(world, sink, batches, **changes):
    model = TinyModel(dropout=0.1).to(world.device)
    parts = {
        "world": world,
        "executor": Plain(model, summed_cross_entropy, world),
        "optimizer": adamw(model, lr=0.01),
        "schedule": WarmupCosine(3, STEPS),
        "batches": batches,
        "steps": STEPS,
        "evaluations": [Evaluation("h", TinyHeldOut(), every=7)],
        "checkpoints": Checkpoints(TorchFiles(), every=7),
        "sinks": [sink],
        "log_every": LOG_EVERY,
    }
    return Trainer(**(parts | changes))


@pytest.mark.parametrize("changes", [{}, {"norm_order": float("inf")}, {"non_finite": "skip"}, {"clip_norm": None}])
def test_no_number_leaves_a_tensor_between_reports(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(ledger, "lag_of", lambda device: 2)
    batches, sink, asked = Marked(), Collector(), []
    for name in ASKING:
        original = getattr(torch.Tensor, name)

        def asking(tensor, *arguments, _original=original, _name=name, **options):
            asked.append((batches.step, _name))
            return _original(tensor, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, name, asking)
    # The dispatcher sees what C++ asks for, the methods what Python does.
    mode = Asked()
    original = Marked.micro_batches

    def micro_batches(self, step):
        asked.extend((self.step, name) for name in mode.found)
        mode.found.clear()
        return original(self, step)

    monkeypatch.setattr(Marked, "micro_batches", micro_batches)
    trainer = build(Alone("cpu"), sink, batches, **changes)
    with mode:
        trainer.run(tmp_path)
    assert [event.step for event in sink.of(StepLogged)] == [1, 5, 10, 15, 20]
    assert [event.step for event in sink.of(Evaluated)] == [0, 7, 14, 20]
    assert [event.step for event in sink.of(CheckpointSaved)] == [7, 14, 20]
    # On the CPU not even reports ask: what they need has arrived.
    assert {step for step, _ in asked} == {0, 7, 14, 20}, "only evaluations and checkpoints ask"


def test_the_test_sees_a_question(tmp_path):
    mode = Asked()
    with mode:
        assert torch.zeros(()).item() == 0
    assert mode.found == ["aten::_local_scalar_dense"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("changes", [{}, {"norm_order": float("inf")}, {"non_finite": "skip"}])
def test_cuda_is_never_waited_for_between_reports(tmp_path, changes):
    class Pinned(Marked):
        """In memory that can be copied from without waiting; raises where the loop waits in a step that is quiet."""

        def micro_batches(self, step):
            batches = [self.pinned(batch) for batch in super().micro_batches(step)]
            torch.cuda.set_sync_debug_mode("default" if step + 1 in OBSERVED else "error")
            return batches

        def pinned(self, batch):
            parts = (batch.tokens_BT.contiguous(), batch.targets_BT.contiguous(), batch.weights_BT)
            return type(batch)(*(part.pin_memory() for part in parts))

    sink = Collector()
    trainer = build(Alone("cuda"), sink, Pinned(), **changes)
    try:
        trainer.run(tmp_path)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [event.step for event in sink.of(StepLogged)] == [1, 5, 10, 15, 20]
