"""The bench of training: its arithmetic, its checks, its configuration, and a round of a tiny model end to end."""

from __future__ import annotations

import importlib
import json
import math
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benches read /proc")


@pytest.fixture
def bench(root, monkeypatch):
    """Imports a module of tools/bench/training as its script does, and forgets it afterwards."""
    before = set(sys.modules)
    for folder in ("tools/bench", "tools/bench/training", "tools/bench/training/drivers"):
        monkeypatch.syspath_prepend(str(root / folder))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(root / "tools") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def tiny(models, **changes):
    shape = models.Shape(64, 32, 64, 2, 2, 2, 16)
    values = {
        "samples_per_step": 4, "micro_batch_size": (2,), "warmup": 2, "steps": 4, "lr": 1e-2,
        "ours": {"ours": models.EAGER},
    }  # fmt: skip
    return models.Case(**{"device": "cpu", "shape": shape, **values, **changes})


def entry(rate: float, **more) -> dict:
    return {
        "tokens_per_second": rate, "step_ms": 64e3 / rate, "first_step": 3.0, "first_loss": math.log(64),
        "last_loss": 3.5, "tokens_per_step": 64, "parameters": 24_736, "device_bytes": 0, "peak_rss": 10**9,
        "differences": [], **more,
    }  # fmt: skip


def test_counts_and_flops_are_those_of_the_decoder(bench):
    models = bench("models")
    decoder = pytest.importorskip("modalities_models.decoder")
    import torch

    for name, case in models.CASES.items():
        shape = case.shape
        with torch.device("meta"):
            model = decoder.decoder(
                vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, layers=shape.layers, heads=shape.heads,
                intermediate_size=shape.intermediate_size, key_value_heads=shape.key_value_heads,
                sequence_length=shape.sequence_length,
            )  # fmt: skip
        assert sum(value.numel() for value in model.parameters()) == shape.parameters, name
        assert model.flops_per_token(shape.sequence_length) == shape.flops_per_token, name
        assert model.causal_flops_per_token(shape.sequence_length) == shape.causal_flops_per_token, name


def test_every_case_ends_with_a_report_and_splits_evenly(bench):
    models = bench("models")
    for name, case in models.CASES.items():
        # Reports come every ``warmup`` steps, so the steps that count end with one.
        assert case.steps % case.warmup == 0, name
        assert all(case.samples_per_step % size == 0 for size in case.micro_batch_size), name
        assert next(iter(case.ours)) == "ours", name


def test_modalities_takes_the_configuration_of_every_variant(bench, tmp_path):
    yaml = pytest.importorskip("yaml")
    wiring = pytest.importorskip("modalities_cli.wiring")
    import dataclasses

    models, ours = bench("models"), bench("ours")
    for name, case in models.CASES.items():
        for variant, options in case.ours.items():
            spec = {
                "shape": dataclasses.asdict(case.shape), "options": options, "warmup": 1, "steps": 1, "log_every": 1,
                "data": "x", "lr": case.lr, "samples_per_step": 4, "micro_batch_size": 2,
            }  # fmt: skip
            document = ours.document(spec)
            taken = {"model", "loss", "executor", "optimizer", "float8"}
            assert set(options) <= taken, f"{name}: {variant} has options that nobody reads"
            (tmp_path / "config.yaml").write_text(yaml.safe_dump(document))
            wiring.checked_graph(tmp_path / "config.yaml")
            assert ("float8" in options) == (document["model"]["component"] == "precision.float8")


def test_ratios_are_taken_within_rounds_and_shares_of_the_best_peak(bench):
    models, summary = bench("models"), bench("summary")
    rounds = {
        "matmul": [{"flops": 1e9}, {"flops": 2e9}, {"flops": 1e9}],
        "ours": [entry(100), entry(300), entry(80)],
        # The second round is fast for everybody; medians of each alone would give another ratio.
        "other": [entry(50), entry(200), entry(100)],
    }
    case = tiny(models)
    found = summary.figures(case, rounds)
    assert found["other"]["ratio"] == {"median": 1.5, "least": 0.8, "most": 2.0}
    assert found["ours"]["ratio"]["median"] == 1.0
    assert found["other"]["tokens_per_second"] == 100
    # Of the fastest products of all rounds, unless a data sheet says more.
    assert found["other"]["mfu"] == pytest.approx(case.shape.flops_per_token * 100 / 2e9)
    rounds["other"] = [entry(50, flops_per_token=7.0, causal_flops_per_token=5.0)] * 3
    assert summary.figures(case, rounds)["other"]["mfu"] == pytest.approx(7 * 50 / 2e9)
    rounds["matmul"][0]["sheet"] = 4e9
    other = summary.figures(case, rounds)["other"]
    assert (other["mfu"], other["of_measured"]) == pytest.approx((7 * 50 / 4e9, 7 * 50 / 2e9))


def test_other_work_is_told(bench):
    models, summary = bench("models"), bench("summary")
    case = tiny(models)
    good = entry(100, parameters=case.shape.parameters)
    assert summary.differences(case, good, True) == []
    for change, told in (
        ({"first_loss": 6.0}, "the first loss is 6.00, ln V is 4.16"),
        ({"last_loss": 4.2}, "the loss went from 4.16 to 4.20"),
        ({"last_loss": math.nan}, "the loss went from 4.16 to nan"),
        ({"tokens_per_step": 60}, "60 tokens per step, not 64"),
        ({"parameters": 30_000}, f"30,000 parameters, not {case.shape.parameters:,}"),
    ):
        assert summary.differences(case, good | change, True) == [told]
    # Another architecture is compared by the weights in its products.
    assert summary.differences(case, good | {"matmul_parameters": case.shape.matmul_parameters}, False) == []
    assert summary.differences(case, good | {"matmul_parameters": 1}, False) != []


def test_our_measures_are_read_from_the_records(bench):
    ours = bench("ours")
    parts = {"step": 0.1, "data": 0.001, "forward": 0.03, "backward": 0.06, "optimizer": 0.009, "other": 0.0}

    def logged(step: int, time: float) -> dict:
        return {
            "event": "step_logged", "step": step, "time": time, "tokens": 64 * step, "loss": 5.0 - step, "mfu": 0.5,
            "tokens_per_second": 640.0, "seconds": parts, "memory_bytes": 1,
        }  # fmt: skip

    records = [
        {"event": "run_started", "time": 10.0, "parameters": 7}, logged(1, 12.0), logged(2, 13.0), logged(4, 14.0),
        logged(6, 15.0), {"event": "run_ended", "time": 16.0},
    ]  # fmt: skip
    found = ours.measures(records, {"warmup": 2, "steps": 4, "device": "cpu"})
    assert (found["tokens_per_second"], found["step_ms"], found["first_step"]) == (128.0, 500.0, 2.0)
    assert (found["first_loss"], found["last_loss"], found["tokens_per_step"]) == (4.0, -1.0, 64)
    assert found["overhead_ms"] == pytest.approx(1.0) and found["overhead_share"] == pytest.approx(0.01)


def test_tokens_are_a_packed_dataset_of_falling_frequencies(bench, tmp_path):
    import numpy as np

    tokens = bench("tokens")
    from modalities_data.datasets.packed import PackedDataset

    for vocabulary, dtype in ((64, "<u2"), (70_000, "<i4")):
        folder = tokens.make(tmp_path, vocabulary, 60_000)
        ids = np.fromfile(folder / "00000.bin", dtype)
        assert len(ids) == 60_000 and ids.max() < vocabulary and (ids == tokens.END).sum() == 100
        counts = np.sort(np.bincount(ids[ids != tokens.END], minlength=vocabulary))[::-1]
        assert 1.7 < counts[0] / counts[1] < 2.3
        assert PackedDataset(folder, 16).largest_id == ids.max()
        assert tokens.make(tmp_path, vocabulary, 60_000) == folder


def test_our_side_is_always_there_and_others_by_name(bench):
    speed = bench("speed")
    options = speed.arguments(["--only", "plain", "--without", "eager"])
    names = ["ours", "ours, eager", "plain", "plain, eager", "hf, best"]
    assert [name for name in names if speed.wanted(name, options)] == ["ours", "plain"]


def test_a_smaller_micro_batch_is_tried_where_memory_ends(bench, monkeypatch, tmp_path):
    models, peers, speed = bench("models"), bench("peers"), bench("speed")
    case = tiny(models, micro_batch_size=(4, 2, 1))
    tried = []

    def driven(peer, made, case, data, scratch, name, options, size):
        tried.append(size)
        if size > 2:
            raise speed.turns.RunError("torch.OutOfMemoryError: CUDA out of memory")
        return entry(100)

    monkeypatch.setattr(speed, "driven", driven)
    sizes: dict[str, int] = {}
    for _ in range(2):
        found = speed.fitting(peers.Peer("x"), None, case, tmp_path, tmp_path, "x", None, sizes)
        assert found["micro_batch_size"] == 2
    assert tried == [4, 2, 2]


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_a_round_of_a_tiny_model_end_to_end(bench, monkeypatch, tmp_path, capsys, device):
    pytest.importorskip("modalities_cli")
    if device == "cuda" and not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("needs a GPU")
    models, speed = bench("models"), bench("speed")
    monkeypatch.setitem(models.CASES, "quickstart", tiny(models, device=device))
    monkeypatch.setitem(speed.TOKENS, device, 20_000)
    words = [
        "speed.py", "--cache", str(tmp_path), "--model", "quickstart", "--only", "plain, eager", "--rounds", "2",
        "--cores", "1", "--timeout", "240", "--save", str(tmp_path / "result"),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(speed.turns.ROOT / "tools/bench/training/speed.py"), *words[1:]])
    (tmp_path / "result.json").write_text(json.dumps({"models": {}}))
    assert speed.main() == 0
    result = json.loads((tmp_path / "result.json").read_text())["models"]["quickstart"]
    assert set(result["all"]) == {"matmul", "ours", "plain, eager"}
    for name in ("ours", "plain, eager"):
        assert len(result["all"][name]) == 2
        assert [found["differences"] for found in result["all"][name]] == [[], []]
        assert result["figures"][name]["mfu"] > 0
    assert result["all"]["ours"][0]["overhead_ms"] > 0
    assert result["all"]["ours"][0]["parts_ms"]["forward"] > 0
    text = (tmp_path / "result.md").read_text()
    assert "| plain, eager |" in text and text.strip() in capsys.readouterr().out
