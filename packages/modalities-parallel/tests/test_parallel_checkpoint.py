from __future__ import annotations

import functools
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from parallel_small_model import SmallModel
from torch import nn

from modalities_core.errors import CheckpointError, ResourceError
from modalities_parallel.checkpoint.differences import refuse_differences
from modalities_parallel.checkpoint.metadata import FILE_NAME
from modalities_parallel.checkpoint.sharded import Sharded

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(autouse=True)
def no_launch(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def fresh(seed: int = 0, fused: bool = False, width: int = 4) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.LayerNorm(width), nn.Linear(width, 2))
    model.register_buffer("count", torch.tensor(seed))
    groups = [{"params": [*model[0].parameters(), *model[2].parameters()]}, {"params": [*model[1].parameters()]}]
    return model, torch.optim.AdamW(groups, lr=1e-2, fused=fused)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, lr: float = 1e-2) -> None:
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
    for group in optimizer.param_groups:
        group["lr"] = lr
    model(inputs).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    state = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"optimizer.{name}.{key}"] = value.clone() if isinstance(value, torch.Tensor) else value
    return state


def assert_same(a: dict[str, object], b: dict[str, object]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == b[name].dtype and torch.equal(value, b[name]), name
        else:
            assert type(value) is type(b[name]) and value == b[name], name


@pytest.fixture
def saved(tmp_path):
    """A checkpoint after three steps, and the state it was saved from."""
    model, optimizer = fresh()
    for number in range(3):
        step(model, optimizer, number)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    Sharded().save(folder, model, optimizer)
    return folder, model, optimizer


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("stepped_before", [0, 2])
def test_a_run_goes_on_bit_for_bit(saved, tmp_path, fused, stepped_before):
    model, optimizer = fresh(fused=fused)
    for number in range(3):
        step(model, optimizer, number)
    (tmp_path / "other").mkdir()
    Sharded().save(tmp_path / "other", model, optimizer)
    again, its_optimizer = fresh(seed=7, fused=fused)
    for number in range(stepped_before):
        step(again, its_optimizer, 50 + number)
    Sharded().load(tmp_path / "other", again, its_optimizer)
    assert_same(everything(again, its_optimizer), everything(model, optimizer))
    assert its_optimizer.param_groups[0]["lr"] == 1e-2
    for number in range(3, 6):
        step(model, optimizer, number)
        step(again, its_optimizer, number)
    assert_same(everything(again, its_optimizer), everything(model, optimizer))


def test_saving_a_fresh_optimizer_changes_nothing(tmp_path):
    model, optimizer = fresh()
    Sharded().save(tmp_path, model, optimizer)
    assert not optimizer.state
    twin, its_optimizer = fresh()
    step(model, optimizer, 1)
    step(twin, its_optimizer, 1)
    assert_same(everything(model, optimizer), everything(twin, its_optimizer))
    Sharded().load(tmp_path, model, optimizer)
    assert not optimizer.state
    assert torch.equal(model[0].weight, fresh()[0][0].weight)


def test_parameters_that_were_never_stepped_stay_without_state(tmp_path):
    model, optimizer = fresh()
    model[1].requires_grad_(False)
    step(model, optimizer, 1)
    Sharded().save(tmp_path, model, optimizer)
    again, its_optimizer = fresh(seed=7)
    Sharded().load(tmp_path, again, its_optimizer)
    assert model[1].weight not in optimizer.state
    assert_same(everything(again, its_optimizer), everything(model, optimizer))


def test_gradients_and_settings_survive_a_load(saved):
    folder, _, _ = saved
    model, optimizer = fresh(seed=7)
    model(torch.ones(1, 3)).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    optimizer.param_groups[1] |= {"lr": 0.5, "weight_decay": 0.25, "mine": "x"}
    Sharded().load(folder, model, optimizer)
    assert all(map(torch.equal, gradients, (parameter.grad for parameter in model.parameters())))
    assert {key: optimizer.param_groups[1][key] for key in ("lr", "weight_decay", "mine")} == {
        "lr": 0.5,
        "weight_decay": 0.25,
        "mine": "x",
    }


def test_numbers_come_back_as_numbers(tmp_path):
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        state = self.state[parameter]
                        state["count"], state["share"] = state.get("count", 0) + 1, 1 / 3
            super().step(closure)

    model, _ = fresh()
    optimizer = Counting(model.parameters(), momentum=0.9)
    step(model, optimizer, 1)
    step(model, optimizer, 2)
    Sharded().save(tmp_path, model, optimizer)
    again, _ = fresh(seed=7)
    its_optimizer = Counting(again.parameters(), momentum=0.9)
    Sharded().load(tmp_path, again, its_optimizer)
    assert its_optimizer.state[again[0].weight]["count"] == 2
    assert_same(everything(again, its_optimizer), everything(model, optimizer))


def test_names_do_not_depend_on_compile_or_recomputation(saved, tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    folder, _, _ = saved
    model, _ = fresh()
    model[0] = torch.compile(checkpoint_wrapper(model[0]), backend="eager")
    optimizer = torch.optim.AdamW(model.parameters())
    assert "_orig_mod" in "".join(name for name, _ in model.named_parameters())
    step(model, optimizer, 0)
    Sharded().save(tmp_path, model, optimizer)
    assert Sharded().tensors(tmp_path) == Sharded().tensors(folder)
    Sharded().load(folder, model, optimizer)


def test_the_model_alone_can_be_loaded(saved):
    folder, model, _ = saved
    again, _ = fresh(seed=7)
    Sharded().load(folder, again, None)
    assert_same(again.state_dict(), model.state_dict())


def test_the_layout_is_told(saved):
    layout = Sharded().tensors(saved[0])
    assert layout["model.0.weight"] == ((4, 3), "float32")
    assert layout["model.count"] == ((), "int64")
    assert layout["optimizer.0.weight.exp_avg"] == ((4, 3), "float32")
    assert len(layout) == 7 + 6 * 3


def test_tensors_of_the_model_can_be_read_one_by_one(saved):
    folder, model, _ = saved
    read = Sharded().model_reader(folder)
    for name, value in model.state_dict().items():
        assert torch.equal(read(name), value) and read(name).dtype == value.dtype
    with pytest.raises(CheckpointError, match="has no tensor 'head'"):
        read("head")
    with pytest.raises(CheckpointError, match="no .metadata"):
        Sharded().model_reader(folder.parent)


def test_torch_itself_reads_what_is_written(saved):
    folder, model, optimizer = saved
    target = {"model.0.weight": torch.zeros(4, 3), "optimizer.0.weight.exp_avg": torch.zeros(4, 3)}
    dcp.load(target, checkpoint_id=folder, no_dist=True)
    assert torch.equal(target["model.0.weight"], model[0].weight)
    assert torch.equal(target["optimizer.0.weight.exp_avg"], optimizer.state[model[0].weight]["exp_avg"])


def test_what_torch_itself_writes_is_read(saved, tmp_path):
    _, model, _ = saved
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    dcp.save(tensors, checkpoint_id=tmp_path / "torch", no_dist=True)
    again, _ = fresh(seed=7)
    Sharded().load(tmp_path / "torch", again, None)
    assert_same(again.state_dict(), model.state_dict())


def test_nothing_of_this_machine_is_written(saved):
    folder, _, _ = saved
    assert str(folder.parent).encode() not in (folder / FILE_NAME).read_bytes()


def refusal(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> str:
    """The refusal's text, having made sure that nothing was changed."""
    before = everything(model, optimizer) if optimizer else dict(model.state_dict())
    with pytest.raises(CheckpointError) as raised:
        Sharded().load(folder, model, optimizer)
    assert_same(everything(model, optimizer) if optimizer else dict(model.state_dict()), before)
    return str(raised.value)


def test_another_shape_is_refused(saved):
    text = refusal(saved[0], *fresh(width=5))
    assert "of another shape or dtype" in text
    assert any(line.split() == ["model.0.bias", "float32", "[4]", "float32", "[5]"] for line in text.splitlines())


def test_a_long_table_is_cut():
    saved = {f"model.{number:02d}": ((number,), "float32") for number in range(50)}
    with pytest.raises(CheckpointError) as raised:
        refuse_differences(saved, {}, "there")
    lines = str(raised.value).splitlines()
    assert "50 unknown to this run" in lines[0]
    assert lines[2].split() == ["model.00", "float32", "[0]", "-"]
    assert "and 30 more" in lines[-2]


def test_another_dtype_is_refused(saved):
    model, _ = fresh()
    model.bfloat16()
    text = refusal(saved[0], model, None)
    assert any(line.split() == ["model.0.bias", "float32", "[4]", "bfloat16", "[4]"] for line in text.splitlines())
    assert "6 of another shape or dtype" in text


def test_missing_and_unknown_tensors_are_refused(saved):
    model, _ = fresh()
    model.add_module("extra", nn.Linear(2, 2, bias=False))
    delattr(model, "2")
    text = refusal(saved[0], model, None)
    assert "1 missing in the checkpoint, 2 unknown to this run" in text
    assert any(line.split() == ["model.extra.weight", "-", "float32", "[2,", "2]"] for line in text.splitlines())
    assert any(line.split() == ["model.2.bias", "float32", "[2]", "-"] for line in text.splitlines())


def test_another_optimizer_is_refused(saved):
    model, _ = fresh()
    text = refusal(saved[0], model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    assert "optimizer.0.weight.exp_avg_sq" in text


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    model, optimizer = fresh()
    dcp.save({"optimizer.x.step": torch.ones(())}, checkpoint_id=tmp_path, no_dist=True)
    assert "missing in the checkpoint" in refusal(tmp_path, model, optimizer)


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    model, _ = fresh()
    _, optimizer = fresh()
    with pytest.raises(CheckpointError, match="a parameter that the model does not have"):
        Sharded().save(tmp_path, model, optimizer)


def test_a_checkpoint_is_never_overwritten(saved):
    folder, model, optimizer = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match="holds a checkpoint already"):
        Sharded().save(folder, model, optimizer)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


class Evil:
    """Runs when it is unpickled."""

    def __init__(self, call, *arguments) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("place", ["whole", "entry", "storage", "planner"])
def test_an_evil_pickle_executes_nothing(saved, tmp_path, place):
    folder, model, optimizer = saved
    mark = tmp_path / "executed"
    path = folder / FILE_NAME
    content = pickle.loads(path.read_bytes())  # noqa: S301
    evil = Evil(os.mkdir, str(mark))
    if place == "entry":
        content.state_dict_metadata["model.0.weight"] = evil
    elif place == "storage":
        content.storage_data = evil
    else:
        content.planner_data = evil
    path.write_bytes(pickle.dumps(evil if place == "whole" else content))
    for attempt in (
        lambda: Sharded().load(folder, model, optimizer),
        lambda: Sharded().load(folder, model, None),
        lambda: Sharded().tensors(folder),
    ):
        with pytest.raises(CheckpointError, match=r"mkdir, which no checkpoint needs") as raised:
            attempt()
        assert raised.value.exit_code == 4
    assert not mark.exists()
    pickle.loads(path.read_bytes())  # noqa: S301
    assert mark.exists(), "the pickle is not evil, so the test shows nothing"


@pytest.mark.parametrize(
    "evil",
    [
        Evil(getattr, dict, "fromkeys"),
        Evil(getattr, dcp.metadata.Metadata, "__init__"),
        Evil(eval, "1"),
        Evil(__import__, "os"),
        Evil(torch.load, "x"),
        Evil(nn.Linear, 1, 1),
    ],
)
def test_only_the_classes_of_metadata_can_be_named(tmp_path, evil):
    (tmp_path / FILE_NAME).write_bytes(pickle.dumps(evil))
    with pytest.raises(CheckpointError, match="no checkpoint needs|is not allowed"):
        Sharded().tensors(tmp_path)


def test_pickled_objects_among_the_tensors_are_refused(saved, tmp_path):
    _, model, _ = saved
    mark = tmp_path / "executed"
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    dcp.save(tensors | {"model.evil": Evil(os.mkdir, str(mark))}, checkpoint_id=tmp_path / "evil", no_dist=True)
    with pytest.raises(CheckpointError, match="'model.evil', which is a pickled object"):
        Sharded().load(tmp_path / "evil", model, None)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..\\secret", ""])
def test_files_elsewhere_are_not_read(saved, name):
    folder, model, _ = saved
    content = pickle.loads((folder / FILE_NAME).read_bytes())  # noqa: S301
    for entry in content.storage_data.values():
        entry.relative_path = name
    (folder / FILE_NAME).write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        Sharded().load(folder, model, None)


def test_damaged_metadata_is_one_sentence(saved):
    folder, model, _ = saved
    path = folder / FILE_NAME
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="is damaged or not checkpoint metadata"):
            Sharded().load(folder, model, None)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="holds a dict instead of checkpoint metadata"):
        Sharded().load(folder, model, None)
    path.unlink()
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        Sharded().load(folder, model, None)


def test_flipped_bits_in_metadata_never_escape_as_other_errors(saved):
    folder, _, _ = saved
    path = folder / FILE_NAME
    whole = path.read_bytes()
    told = 0
    for place in range(0, len(whole), 31):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        model, optimizer = fresh()
        try:
            Sharded().load(folder, model, optimizer)
        except CheckpointError:
            told += 1
    assert told > len(whole) / 31 / 4  # many bits are of names and numbers that only a checksum can protect


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_a_damaged_file_is_named(saved, damage):
    folder, model, optimizer = saved
    (data,) = folder.glob("*.distcp")
    content = data.read_bytes()
    data.unlink()
    if damage != "missing":
        data.write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
    with pytest.raises(CheckpointError) as raised:
        Sharded().load(folder, model, optimizer)
    assert str(folder) in str(raised.value)
    assert "missing" in str(raised.value) if damage == "missing" else "damaged" in str(raised.value)


@pytest.mark.parametrize("name", ["__0_0.distcp", FILE_NAME + ".tmp"])
@pytest.mark.parametrize("width", [4, 4096])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_called_by_its_name(tmp_path, name, width):
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(ResourceError, match="disk full while writing the checkpoint.*MiB free") as raised:
        Sharded().save(tmp_path, *fresh(width=width))
    assert raised.value.exit_code == 5
    assert not (tmp_path / FILE_NAME).exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "__0_0.distcp").mkdir()
    with pytest.raises(ResourceError, match=r"cannot be written: .*__0_0.distcp: Is a directory"):
        Sharded().save(tmp_path, *fresh())


def test_every_file_is_synced_before_save_returns(tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync

    def recording(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recording)
    Sharded().save(tmp_path, *fresh())
    assert synced >= {str(tmp_path), str(tmp_path / "__0_0.distcp"), str(tmp_path / (FILE_NAME + ".tmp"))}
    assert {path.name for path in tmp_path.iterdir()} == {"__0_0.distcp", FILE_NAME}


# ------------------------------------------------------------------------------------------------- several ranks


def same(a: Path, b: Path) -> None:
    with np.load(a) as first, np.load(b) as second:
        assert set(first.files) == set(second.files)
        for name in first.files:
            assert first[name].dtype == second[name].dtype and np.array_equal(first[name], second[name]), name


def on_one(function: str, **arguments):
    import parallel_programs

    return getattr(parallel_programs, function)(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("written", "read"), [(1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (3, 2)])
def test_any_number_of_ranks_reads_what_any_number_wrote(on_ranks, tmp_path, written, read):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    run = {1: on_one}
    options = {"tie": "read", "fused": written == read}
    saved = run.get(written, functools.partial(on_ranks, written))(
        "save", folder=str(folder), out=str(tmp_path / "saved.npz"), evaluate=True, **options
    )
    loaded = run.get(read, functools.partial(on_ranks, read))(
        "load",
        folder=str(folder),
        out=str(tmp_path / "loaded.npz"),
        before=1 if written == 2 else 0,
        evaluate=True,
        **options,
    )
    same(tmp_path / "saved.npz", tmp_path / "loaded.npz")
    if written == read:
        assert loaded == saved
        same(tmp_path / "saved.npz-more.npz", tmp_path / "loaded.npz-more.npz")
    else:
        first = [saved if written == 1 else saved[0], loaded if read == 1 else loaded[0]]
        np.testing.assert_allclose(first[0], first[1], rtol=1e-5)


@pytest.mark.slow
def test_all_ranks_refuse_together(on_ranks, tmp_path):
    good, other, broken = tmp_path / "good", tmp_path / "other", tmp_path / "broken"
    for folder in (good, other, broken):
        folder.mkdir()
    model = SmallModel(hidden=12)
    Sharded().save(other, model, torch.optim.AdamW(model.parameters()))
    (broken / FILE_NAME).write_bytes(b"x")
    for folder, said in ((good, "not a whole checkpoint"), (other, "of another shape"), (broken, "is damaged")):
        for result in on_ranks(2, "load_refused", folder=str(folder)):
            assert result["refusal"][0] == "CheckpointError"
            assert said in result["refusal"][1]
            assert result["together"] == 2.0
            assert result["state"] == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_one_rank_is_told_to_all(on_ranks, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "__1_0.distcp").symlink_to("/dev/full")
    for kind, text in on_ranks(2, "save_refused", folder=str(tmp_path / "checkpoint")):
        assert kind == "ResourceError"
        assert "disk full" in text and "__1_0.distcp" in text
    assert not (tmp_path / "checkpoint" / FILE_NAME).exists()
