"""Two processes: they train what one does, and a failure or a wish of one is known to both."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from training_parts import Collector, TinyBatches, TinyHeldOut, TinyModel, TorchFiles, summed_cross_entropy

from modalities_core.errors import ModalitiesError
from modalities_core.events import Evaluated, RunStarted, StepLogged
from modalities_core.training.checkpointing import Checkpoints
from modalities_core.training.evaluator import Evaluation
from modalities_core.training.executor import Plain
from modalities_core.training.optim import adamw
from modalities_core.training.schedule import Constant
from modalities_core.training.trainer import Trainer
from modalities_core.training.world import Alone

STEPS = 6


class Pair(Alone):
    """Two gloo processes whose models are replicas."""

    def __init__(self):
        super().__init__("cpu")
        self.rank = self.data_rank = dist.get_rank()
        self.size = self.data_size = dist.get_world_size()

    def sum(self, values):
        dist.all_reduce(values)
        return values

    def norm_share(self, parameters, order):
        return super().norm_share(parameters, order) / self.size

    def broadcast(self, value):
        holder = [value]
        dist.broadcast_object_list(holder)
        return json.loads(json.dumps(holder[0]))

    def barrier(self):
        dist.barrier()


class Replicated(Plain):
    """Sums the gradients over the ranks."""

    def forward_backward(self, micro_batches):
        sums = super().forward_backward(micro_batches)
        for parameter in self.model.parameters():
            self.world.sum(parameter.grad)
        return sums


class HalfHeldOut(TinyHeldOut):
    """Every second batch of four."""

    def __init__(self, rank, ranks):
        super().__init__(batches=4)
        self.rank, self.ranks = rank, ranks

    def __iter__(self):
        return iter(list(super().__iter__())[self.rank :: self.ranks])


def build(world, sink, batches=None, format=None):
    model = TinyModel()
    return Trainer(
        world=world,
        executor=Replicated(model, summed_cross_entropy, world),
        optimizer=adamw(model, lr=0.05),
        schedule=Constant(),
        batches=batches or TinyBatches(8, 2, rank=world.data_rank, ranks=world.data_size),
        steps=STEPS,
        evaluations=[Evaluation("h", HalfHeldOut(world.data_rank, world.data_size), every=3)],
        checkpoints=Checkpoints(format or FirstWrites(world), every=2),
        sinks=[sink],
        log_every=1,
    )


class FirstWrites(TorchFiles):
    """Replicas are written once."""

    def __init__(self, world):
        self.world = world

    def save(self, folder, model, optimizer):
        if self.world.rank == 0:
            super().save(folder, model, optimizer)


def outcome(world, folder, batches=None, format=None, **options):
    """Weights, events and error of one run, as JSON values."""
    sink = Collector()
    trainer = build(world, sink, batches, format)
    error = step = None
    try:
        step = trainer.run(folder, **options).step
    except ModalitiesError as caught:
        error = [type(caught).__name__, caught.message]
    return {
        "error": error,
        "step": step,
        "weights": [value.tolist() for value in trainer.executor.model.parameters()],
        "losses": [event.loss for event in sink.of(StepLogged)],
        "evaluated": [(event.step, event.loss, event.tokens) for event in sink.of(Evaluated)],
        "first_step": [event.first_step for event in sink.of(RunStarted)],
        "folders": sorted(path.name for path in (folder / "checkpoints").glob("*")),
    }


class OnRankOne(TinyBatches):
    """Does something on rank 1 before one step."""

    def __init__(self, world, step, action):
        super().__init__(8, 2, rank=world.data_rank, ranks=world.data_size)
        self.step, self.action = step, action

    def micro_batches(self, step):
        batches = super().micro_batches(step)
        if self.rank == 1 and step == self.step:
            self.action(batches)
        return batches


class FailingOnRankOne(FirstWrites):
    def save(self, folder, model, optimizer):
        super().save(folder, model, optimizer)
        if self.world.rank == 1:
            raise OSError(28, "No space left on device")


def scenarios(folder):
    world = Pair()
    found = {"unbroken": outcome(world, folder / "unbroken")}

    def poison(batches):
        batches[0].weights_BT[0, 0] = float("nan")

    found["not finite"] = outcome(world, folder / "nan", OnRankOne(world, 3, poison))
    found["signalled"] = outcome(
        world, folder / "signal", OnRankOne(world, 2, lambda _: signal.raise_signal(signal.SIGTERM))
    )
    found["resumed"] = outcome(world, folder / "signal")
    found["disk full on one"] = outcome(world, folder / "disk", format=FailingOnRankOne(world))
    if world.rank == 0:
        path = folder / "unbroken" / "checkpoints" / "step-00000006" / "model.pt"
        path.write_bytes(path.read_bytes()[:-1])
        (folder / "unbroken" / "status.json").unlink()
    dist.barrier()
    found["damaged"] = outcome(world, folder / "unbroken")
    found["no such step"] = outcome(world, folder / "unbroken", from_step=5)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks found in all scenarios."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder)]
    processes = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(2)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


pytestmark = pytest.mark.slow


def test_two_ranks_train_what_one_does(ranks, tmp_path):
    alone = outcome(Alone("cpu"), tmp_path)
    first, second = (found["unbroken"] for found in ranks)
    assert first["weights"] == second["weights"]
    for mine, theirs in zip(first["weights"], alone["weights"], strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-4, atol=1e-6)
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    for mine, theirs in zip(first["evaluated"], alone["evaluated"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    assert second["losses"] == second["evaluated"] == []


def test_not_finite_on_one_stops_both_before_the_update(ranks):
    errors = [found["not finite"]["error"] for found in ranks]
    assert errors[0] == errors[1]
    assert errors[0][0] == "NumericalError"
    assert "step 4 " in errors[0][1]
    assert "not finite on rank 1 of 2 ranks" in errors[0][1]
    assert ranks[0]["not finite"]["losses"] == ranks[0]["unbroken"]["losses"][:3]


def test_signal_to_one_stops_both_and_resuming_equals_unbroken(ranks):
    for found in ranks:
        kind, message = found["signalled"]["error"]
        assert (kind, "after step 3 of 6, saved" in message) == ("Preempted", True)
        assert "step-00000003" in found["signalled"]["folders"]
        assert found["resumed"]["weights"] == found["unbroken"]["weights"]
    assert ranks[0]["resumed"]["first_step"] == [3]


def test_full_disk_on_one_fails_both_and_leaves_nothing(ranks):
    assert ranks[0]["disk full on one"]["error"][0] == "DistributedError"
    assert "one other rank failed while saving" in ranks[0]["disk full on one"]["error"][1]
    assert ranks[1]["disk full on one"]["error"][0] == "ResourceError"
    assert ranks[0]["disk full on one"]["folders"] == []


def test_both_fall_back_to_the_same_checkpoint(ranks):
    assert ranks[0]["damaged"]["first_step"] == [4]
    for found in ranks:
        assert found["damaged"]["step"] == STEPS
        assert found["damaged"]["weights"] == found["unbroken"]["weights"]
        assert found["no such step"]["error"][0] == "CheckpointError"


if __name__ == "__main__":
    place, number = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=number, world_size=2)
    (place / f"{number}.json").write_text(json.dumps(scenarios(place)))
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads sometimes abort an interpreter that tears itself down
