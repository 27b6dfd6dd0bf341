"""The loop against a hand-written one, its checks, and its behaviour when things go wrong."""

import itertools
import json
import math

import pytest
import torch
from training_parts import Collector, TinyBatches, TinyHeldOut, TinyModel, TorchFiles, summed_cross_entropy

from modalities_core.errors import ConfigError, DistributedError, NumericalError
from modalities_core.events import CheckpointSaved, Evaluated, RunEnded, RunStarted, StepLogged, Warned
from modalities_core.interfaces import Batch
from modalities_core.training.checkpointing import Checkpoints
from modalities_core.training.evaluator import Evaluation
from modalities_core.training.executor import Plain
from modalities_core.training.optim import adamw
from modalities_core.training.parameters import tensor_layout
from modalities_core.training.schedule import Linear
from modalities_core.training.trainer import Trainer
from modalities_core.training.world import Alone


def trainer(model=None, world=None, **changes):
    world = world or Alone("cpu")
    model = model or TinyModel()
    sink = Collector()
    parts = {
        "world": world,
        "executor": Plain(model, summed_cross_entropy, world),
        "optimizer": adamw(model, lr=0.05),
        "schedule": Linear(2, 20),
        "batches": TinyBatches(),
        "steps": 6,
        "sinks": [sink],
        "log_every": 1,
    }
    parts |= changes
    return Trainer(**parts), sink


def hand_written(steps, clip_norm, batches):
    """Mean loss over the whole batch, torch's clipping, torch's AdamW, no accumulation; float64."""
    model = TinyModel().double()
    decayed = [model.hidden.weight, model.head.weight]
    rest = [value for value in model.parameters() if not any(value is other for other in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.95), foreach=False, fused=False)
    records = []
    for step in range(steps):
        batch = TinyBatches(8, 8, weighted=batches.weighted).micro_batches(step)[0]
        factor = (step + 1) / 2 if step < 2 else 1 - (step - 2) / 18
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * factor
        optimizer.zero_grad()
        logits = model.head(model(batch.tokens_BT)).flatten(0, 1)
        each = torch.nn.functional.cross_entropy(logits, batch.targets_BT.flatten(), reduction="none")
        weights = batch.weights_BT.flatten().double() if batches.weighted else torch.ones_like(each)
        loss = (each * weights).sum() / weights.sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        records.append((loss.item(), norm.item(), 0.05 * factor))
    return model, records


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("clip_norm", [0.1, None])
@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
def test_loop_equals_a_hand_written_one(tmp_path, micro_batch_size, clip_norm, weighted):
    batches = TinyBatches(8, micro_batch_size, weighted=weighted)
    ours = TinyModel().double()
    loop, sink = trainer(ours, batches=batches, clip_norm=clip_norm)
    loop.run(tmp_path)
    theirs, records = hand_written(6, clip_norm or math.inf, batches)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
    logged = [(event.loss, event.gradient_norm, event.learning_rate) for event in sink.of(StepLogged)]
    for mine, other in zip(logged, records, strict=True):
        assert mine == pytest.approx(other, rel=1e-5)


def test_events_tell_the_whole_run(tmp_path):
    evaluation = Evaluation("held-out", TinyHeldOut(), every=4)
    checkpoints = Checkpoints(TorchFiles(), every=4)
    loop, sink = trainer(evaluations=[evaluation], checkpoints=checkpoints, log_every=4)
    progress = loop.run(tmp_path)
    assert (progress.step, progress.samples, progress.tokens) == (6, 48, 288)
    kinds = [(type(event).__name__, getattr(event, "step", None)) for event in sink.events]
    assert kinds == [
        ("RunStarted", None),
        ("Warned", None),  # the schedule has 20 steps
        ("Evaluated", 0),
        ("StepLogged", 1),
        ("StepLogged", 4),
        ("CheckpointSaved", 4),
        ("Evaluated", 4),
        ("StepLogged", 6),
        ("CheckpointSaved", 6),
        ("Evaluated", 6),
        ("RunEnded", 6),
    ]
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["steps"]) == ("done", 6, 6)
    assert sink.events[-1] == RunEnded(6, "done", "")
    assert sink.of(CheckpointSaved)[0].bytes > 1000
    assert sink.of(RunStarted)[0].parameters == sum(value.numel() for value in TinyModel().parameters())


def test_logged_loss_is_the_token_weighted_mean_of_its_window(tmp_path):
    each, single = trainer()
    each.run(tmp_path / "a")
    window, sink = trainer(log_every=3)
    window.run(tmp_path / "b")
    losses = [event.loss for event in single.of(StepLogged)]
    tokens = [sum(batch.weights_BT.sum().item() for batch in TinyBatches().micro_batches(step)) for step in range(6)]
    expected = sum(loss * count for loss, count in zip(losses[3:], tokens[3:], strict=True)) / sum(tokens[3:])
    assert [event.step for event in sink.of(StepLogged)] == [1, 3, 6]
    assert sink.of(StepLogged)[-1].loss == pytest.approx(expected, rel=1e-6)


class TwoRanksInOne(Alone):
    """Stands for the second rank of two: adds what the other one sends into each reduction."""

    def __init__(self, other):
        super().__init__("cpu")
        self.size = self.data_size = 2
        self.other = list(other)

    def sum(self, values):
        return values + torch.tensor(self.other.pop(0), dtype=values.dtype) if self.other else values

    def broadcast(self, value):
        return value or {"value": None}


def test_not_finite_on_another_rank_stops_this_one_before_the_update(tmp_path):
    world = TwoRanksInOne([[math.nan, 24.0, 1.0, 0.0, 0.0, 0.0, 1.0]])
    model = TinyModel()
    before = [value.detach().clone() for value in model.parameters()]
    loop, sink = trainer(model, world=world)
    with pytest.raises(NumericalError, match=r"step 1 .* on rank 1 of 2 ranks; the samples are 0 to 7"):
        loop.run(tmp_path)
    assert all(torch.equal(now, old) for now, old in zip(model.parameters(), before, strict=True))
    assert sink.of(RunEnded)[0].state == "failed"
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_not_finite_loss_or_gradient_stops_before_the_update(tmp_path, poison):
    class Poisoned(TinyBatches):
        def micro_batches(self, step):
            batches = super().micro_batches(step)
            if step == 3:
                batches[1].weights_BT[0, 0] = poison
            return batches

    model = TinyModel()
    snapshots = []
    loop, _ = trainer(model, batches=Poisoned())
    original = loop.optimizer.step
    loop.optimizer.step = lambda: (original(), snapshots.append([v.detach().clone() for v in model.parameters()]))
    with pytest.raises(NumericalError, match="step 4 ") as caught:
        loop.run(tmp_path)
    assert caught.value.exit_code == 7
    assert all(torch.equal(now, old) for now, old in zip(model.parameters(), snapshots[2], strict=True))


def test_a_step_without_any_target_changes_nothing_to_nan(tmp_path):
    class Empty(TinyBatches):
        def micro_batches(self, step):
            return [Batch(b.tokens_BT, b.targets_BT, b.weights_BT * (step != 1)) for b in super().micro_batches(step)]

    model = TinyModel()
    loop, sink = trainer(model, batches=Empty())
    loop.run(tmp_path)
    assert all(torch.isfinite(value).all() for value in model.parameters())
    assert [math.isnan(event.loss) for event in sink.of(StepLogged)] == [False, True, False, False, False, False]


def test_sinks_that_raise_are_one_warning(tmp_path):
    class Broken:
        def consume(self, event):
            raise RuntimeError("no network")

        def close(self):
            raise RuntimeError("still none")

    sink = Collector()
    loop, _ = trainer(sinks=[Broken(), sink])
    assert loop.run(tmp_path).step == 6
    assert [event.message for event in sink.of(Warned) if "no network" in event.message] == [
        "the sink Broken failed and the run goes on: RuntimeError: no network"
    ]
    assert len(sink.of(StepLogged)) == 6


def test_unwritable_status_is_a_warning(tmp_path, monkeypatch):
    def refuse(path, value, durable):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("modalities_core.training.journal.write_json", refuse)
    loop, sink = trainer()
    assert loop.run(tmp_path).step == 6
    assert len([event for event in sink.of(Warned) if "status.json" in event.message]) == 1


def test_evaluation_is_exact_over_all_tokens(tmp_path):
    model = TinyModel(dropout=0.5).double()
    executor = Plain(model, summed_cross_entropy, Alone("cpu"))
    event = Evaluation("h", TinyHeldOut(bytes_per_token=3.5), every=1).measure(executor, Alone("cpu"), 7)
    model.eval()
    rows = list(TinyHeldOut())
    tokens = torch.cat([b.tokens_BT for b in rows])[:-1]
    targets = torch.cat([b.targets_BT for b in rows])[:-1]
    mean = torch.nn.functional.cross_entropy(model.head(model(tokens)).flatten(0, 1), targets.flatten()).item()
    assert event.tokens == tokens.numel()
    assert event.loss == pytest.approx(mean, rel=1e-6)
    assert event.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    assert event.bits_per_byte == pytest.approx(mean / math.log(2) / 3.5, rel=1e-6)
    assert (event.step, event.name) == (7, "h")


def test_evaluation_without_targets_and_bad_arguments():
    executor = Plain(TinyModel(), summed_cross_entropy, Alone("cpu"))
    with pytest.raises(Exception, match="no target that counts"):
        Evaluation("h", TinyHeldOut(weight=0.0), every=1).measure(executor, Alone("cpu"), 0)
    with pytest.raises(ConfigError):
        Evaluation("h", TinyHeldOut(), every=0)
    with pytest.raises(ConfigError):
        Evaluation("", TinyHeldOut(), every=1)


def test_evaluation_times():
    evaluation = Evaluation("h", TinyHeldOut(), every=3, at_start=False)
    assert [step for step in range(9) if evaluation.due(step, 8)] == [3, 6, 8]
    assert Evaluation("h", TinyHeldOut(), every=3).due(0, 8)


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"steps": 0}, "steps"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"clip_norm": math.nan}, "clip_norm"),
        ({"log_every": 0}, "log_every"),
        ({"norm_order": 3.0}, "norm_order"),
        ({"most_skips": 0}, "most_skips"),
        ({"most_roll_backs": 0}, "most_roll_backs"),
        ({"collect_garbage_every": 0}, "collect_garbage_every"),
        ({"non_finite": "ignore"}, "non_finite"),
        ({"non_finite": "roll_back"}, "checkpoints"),
    ],
)
def test_numbers_out_of_range_are_refused(changes, argument):
    with pytest.raises(ConfigError, match=argument):
        trainer(**changes)


def test_data_that_does_not_fit_the_model_is_refused_on_the_meta_device():
    with torch.device("meta"):
        model = TinyModel()
    wide, long = TinyBatches(), TinyHeldOut()
    wide.largest_id, long.sequence_length = 11, 7
    with pytest.raises(ConfigError, match="token id 11") as caught:
        trainer(model, batches=wide)
    assert caught.value.about == (model, "vocab_size")
    assert "at least 12" in caught.value.hint
    with pytest.raises(ConfigError, match="sequences of 7") as caught:
        trainer(model, evaluations=[Evaluation("h", long, every=1)])
    assert caught.value.about == (model, "sequence_length")
    with pytest.raises(ConfigError, match="2 held-out sets have the name 'h'"):
        trainer(model, evaluations=[Evaluation("h", TinyHeldOut(), every=1)] * 2)


def test_meta_model_checks_but_does_not_run(tmp_path):
    with torch.device("meta"):
        model = TinyModel()
    loop, _ = trainer(model)
    with pytest.raises(ConfigError, match="meta device"):
        loop.run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_ranks_whose_gradients_would_stay_apart_are_refused():
    class Refusing(Alone):
        def check(self, model):
            raise ConfigError("not sharded", about=model)

    with pytest.raises(ConfigError, match="not sharded"):
        trainer(world=Refusing("cpu"))


def test_failure_of_one_rank_reaches_the_others():
    from modalities_core.training.collective import on_first, together

    class Second(Alone):
        def __init__(self):
            super().__init__("cpu")
            self.rank, self.size = 1, 2

        def broadcast(self, value):
            return {"error": "ResourceError", "message": "disk full", "hint": "make room"}

        def sum(self, values):
            return values + 1

    with pytest.raises(Exception, match="disk full") as caught:
        on_first(Second(), lambda: pytest.fail("only rank 0 acts"))
    assert (type(caught.value).__name__, caught.value.hint) == ("ResourceError", "make room")
    with pytest.raises(DistributedError, match="one other rank failed while saving"):
        together(Second(), lambda: None, "saving")
    with pytest.raises(OSError, match="mine"):
        together(Second(), lambda: (_ for _ in ()).throw(OSError("mine")), "saving")


def test_evaluated_events_only_from_rank_zero(tmp_path):
    world = TwoRanksInOne([])
    world.rank = world.data_rank = 1
    loop, sink = trainer(world=world, evaluations=[Evaluation("h", TinyHeldOut(), every=1)])
    loop.run(tmp_path)
    assert sink.of(Evaluated) == []
    assert not (tmp_path / "status.json").exists()


def test_a_model_that_finishes_steps_is_told_of_each_after_the_update(tmp_path):
    class Finishing(TinyModel):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.calls = []

        def finish_step(self, world):
            self.seen += 1
            self.calls.append((world, self.head.weight.detach().clone(), self.head.weight.grad))

    model = Finishing()
    before = model.head.weight.detach().clone()
    loop, _ = trainer(model, steps=3, checkpoints=Checkpoints(TorchFiles(), every=2))
    loop.run(tmp_path)
    assert len(model.calls) == 3 and all(world is loop.world for world, _, _ in model.calls)
    weights = [before, *(weight for _, weight, _ in model.calls)]
    assert all(not torch.equal(one, other) for one, other in itertools.pairwise(weights))
    assert torch.equal(weights[-1], model.head.weight) and model.calls[0][2] is None
    again = Finishing()
    extended, _ = trainer(again, steps=5, checkpoints=Checkpoints(TorchFiles(), every=2))
    extended.run(tmp_path)
    assert len(again.calls) == 2 and again.seen == 5, "the checkpoint of step 3 has the buffer"


def test_manifests_list_what_checkpoints_keep():
    model = TinyModel()
    model.register_buffer("kept", torch.zeros(2))
    model.register_buffer("scratch", torch.zeros(3), persistent=False)
    layout = tensor_layout(model)
    assert layout["kept"] == ([2], "float32") and "scratch" not in layout
    assert layout.keys() == model.state_dict().keys()
